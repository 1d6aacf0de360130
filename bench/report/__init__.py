"""Tables, charts and the HTML report, computed from result files alone."""
