"""From teacher expansions to a merged student: pairs -> SFT -> DPO -> merge. Light to import."""
