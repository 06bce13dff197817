"""``vllm-steer verify``: checks that steering works with the installed vLLM.

``run`` starts the engines, each in a separate ``process`` that runs ``engine_child`` and serves
``engine_calls``, has ``checks`` judge their answers to the requests of ``cases`` by the differences of
``compare``, and ``speed`` time them in the rounds of ``interleave``; ``report`` is the page. The caller
provides the Hugging Face reference. Importing these modules imports neither torch nor vllm.
"""
