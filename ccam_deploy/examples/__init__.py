"""Data that the package brings or makes: digits in scenes, their classifier, photographs."""
