"""The status page: one self-contained document, live by ``GET /v1/events``, plain tables without JavaScript."""
