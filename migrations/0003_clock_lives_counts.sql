-- When the clock was last set forward, and by how much: what was stored before seems older than it is.
ALTER TABLE cluster ADD COLUMN step_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE cluster ADD COLUMN step_ms BIGINT NOT NULL DEFAULT 0;
-- Nodes ask for lives by their state.
CREATE INDEX lives_by_state ON lives (alive, kind, epoch);
-- When the hold began: one that begins in the future is of a time when the clock was ahead.
ALTER TABLE cluster ADD COLUMN hold_began BIGINT NOT NULL DEFAULT 0;
-- What one node has counted for all.
ALTER TABLE cluster ADD COLUMN users_online BIGINT NOT NULL DEFAULT 0;
ALTER TABLE cluster ADD COLUMN users_counted_at BIGINT NOT NULL DEFAULT 0;
ALTER TABLE cluster ADD COLUMN inbox_messages BIGINT NOT NULL DEFAULT 0;
ALTER TABLE cluster ADD COLUMN inbox_oldest BIGINT NOT NULL DEFAULT 0;
