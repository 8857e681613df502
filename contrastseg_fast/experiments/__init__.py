"""The paper's experiments on real images; needs the `demo` extra. The package itself never imports this."""
