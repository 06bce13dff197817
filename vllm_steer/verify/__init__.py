"""Does steering work with the vLLM that is installed here? ``vllm-steer verify`` asks it.

``run`` starts the engines, each in a ``process`` of its own that runs ``engine_child`` and is asked
``engine_calls``, has ``checks`` judge their answers to the requests of ``cases`` by the differences of
``compare``, and ``speed`` time them in the rounds of ``interleave``; ``report`` is the page. The Hugging
Face model that answers are held against comes from the caller. Importing these modules imports neither
torch nor vllm.
"""
