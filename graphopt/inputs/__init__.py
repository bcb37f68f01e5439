"""Where inputs come from: the user's data (calibration), made-up data (probes), and what they do inside a model."""
