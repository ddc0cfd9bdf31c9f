"""How sharp the tests are: small changes of the code, each of which some test should notice (``make mutants``)."""
