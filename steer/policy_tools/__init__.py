"""Tools for writing a policy: a template to start from, and a check with the verifier's figures."""
