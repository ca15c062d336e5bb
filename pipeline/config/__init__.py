"""params.yaml, profiles and studies; what decides a trial's number; what the papers print."""
