"""Extraction of steering vectors: statements and concepts in, a steering pack out.

``extract.extract_pack`` is the pipeline; the other modules are its stages, in order: ``inputs``,
``prompts``, ``capture`` (with ``batches`` and ``attention_rows``), ``enrichment``, ``labels``,
``estimators`` (with ``rfm`` and ``linear``), ``learning`` for one concept, ``shards`` for many,
``parts`` and ``figures`` on disk. The method is that of arXiv 2602.00333, attention-guided extraction;
equations named in docstrings are that paper's. ``methods`` has the other methods as settings of the same
stages, with ``plane`` for Angular Steering.
"""
