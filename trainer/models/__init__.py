"""Networks: students from teachers, text encoders, feature encoders, discriminators, LoRAs. Knows neither recipes nor Ray."""
