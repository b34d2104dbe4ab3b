"""From requests to tokens: sequences, pages, prefix cache, scheduler, batch, runner and the step loop.

Everything but ``runner`` and ``memory_plan`` is plain Python and NumPy, so it runs and is tested anywhere.
"""
