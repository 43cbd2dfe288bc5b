"""The built-in types of personal data, a module each: `make(config: PiiConfig) -> PiiType`. A new module is a new type."""
