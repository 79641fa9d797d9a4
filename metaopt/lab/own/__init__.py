"""Problems that users give in one call: functions and loaders, Lightning modules, Hugging Face models."""
