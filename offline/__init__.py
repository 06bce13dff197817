"""Attention-guided extraction of steering vectors: statements and concepts in, a steering pack out.

``extract.extract_pack`` is the pipeline; the other modules are its stages, in order: ``prompts``,
``capture``, ``labels``, ``estimators``. The method is that of arXiv 2602.00333; equations named in
docstrings are that paper's.
"""
