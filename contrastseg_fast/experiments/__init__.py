"""The paper's experiments on real images; the package itself never imports this.

The demo needs the extra `demo`, all else the extra `experiments`.
"""
