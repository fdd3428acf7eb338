"""Everything that a person sees of a run: words, tables and figures.

- ``fit``, ``order``, ``sweep``, ``search``, ``analysis``, ``prediction``: the blocks of a command's report, from its
  records.
- ``blocks``: what a block is; ``terminal``, ``html``, ``markdown`` draw it; ``pages`` writes the files.
- ``figures``, ``plots`` and ``*_figures``: the pictures, by matplotlib; ``figure_style``: light and dark.
- ``sections``, ``formatting``, ``*_numbers``: words and numbers that several reports share.
"""
