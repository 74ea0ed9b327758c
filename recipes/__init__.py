"""Recipe files and the schema that turns one into typed objects."""
