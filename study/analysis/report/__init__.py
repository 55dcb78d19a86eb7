"""The page that people read first.

``page`` makes it; ``answers`` holds what came out, ``curves`` where on an axis quality is best,
``rows`` the tables, ``origins`` where the numbers came from, ``study`` what all of them are made
from. Numbers are made here, the words stand in ``templates``.
"""
