"""Tables, statistics, figures and the report; needs no torch."""
