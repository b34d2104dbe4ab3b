"""cupyinfer: a CuPy-based LLM inference engine in pure Python that shows how one works."""

__version__ = "0.1.0"
