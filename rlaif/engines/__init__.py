"""Who answers: one protocol, and asking so that no answer is paid for twice."""
