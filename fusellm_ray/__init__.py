"""Online multi-teacher knowledge fusion of large language models on Ray.

text → rows of target tokens → teachers score the same bytes → align and project → frame → (Ray) →
trainer rank joins K teachers → fuse → loss → step → checkpoint → export / evaluate
"""

__version__ = "0.1.0"
