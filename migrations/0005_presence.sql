-- How users want to be seen, what others were shown of them, and how long they were online.

-- The record's version when others were shown something new, and the version of the row when a node wrote that which knows of it.
ALTER TABLE users ADD COLUMN shown_version BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN shown_for BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN shown_seen_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN status_since_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN status_until_ms BIGINT;
ALTER TABLE users ADD COLUMN status_text VARCHAR(256) /*! CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */ NOT NULL DEFAULT '';
-- The part of the session that is not in online_days yet; 0: offline.
ALTER TABLE users ADD COLUMN online_since_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN session_counted INT NOT NULL DEFAULT 0;
ALTER TABLE routes ADD COLUMN idle INT NOT NULL DEFAULT 0;

CREATE INDEX users_by_status_end ON users (status_until_ms);

CREATE TABLE status_log (
    user_id      BIGINT NOT NULL,
    version      BIGINT NOT NULL,
    at_ms        BIGINT NOT NULL,
    shown        INT    NOT NULL,
    hidden       INT    NOT NULL,                -- 1: nobody saw it
    cause        INT    NOT NULL,
    devices      INT    NOT NULL,
    gateway_addr VARCHAR(255) NOT NULL,          -- that was bound last; empty: offline
    PRIMARY KEY (user_id, version)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE INDEX status_log_by_age ON status_log (at_ms);

CREATE TABLE online_days (
    user_id         BIGINT NOT NULL,
    day             INT    NOT NULL,             -- since 1970, of UTC
    online_ms       BIGINT NOT NULL,
    hidden_ms       BIGINT NOT NULL,
    sessions        INT    NOT NULL,
    hidden_sessions INT    NOT NULL,
    PRIMARY KEY (user_id, day)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE INDEX online_days_by_age ON online_days (day);
