"""Records and pages: what a ledger or a forecast says, as JSON and as text. No arithmetic beyond shares."""
