-- One text for both engines: SQLite takes /*! ... */ for a comment, MySQL and MariaDB execute it.
-- Times are milliseconds on the database's clock. Identifiers are ASCII and compared as bytes.

CREATE TABLE users (
    user_id       BIGINT NOT NULL PRIMARY KEY,
    version       BIGINT NOT NULL,               -- 0: no such user
    status        INT    NOT NULL DEFAULT 1,
    last_seen_ms  BIGINT NOT NULL DEFAULT 0,
    inbox_seq     BIGINT NOT NULL DEFAULT 0,
    inbox_pending BIGINT NOT NULL DEFAULT 0
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE TABLE routes (
    user_id         BIGINT       NOT NULL,
    device_id       VARCHAR(128) NOT NULL,
    platform        INT          NOT NULL,
    epoch           BIGINT       NOT NULL,
    conn_id         VARCHAR(128) NOT NULL,
    connected_at_ms BIGINT       NOT NULL,
    client_ip       VARCHAR(45)  NOT NULL,
    client_port     INT          NOT NULL,
    bound_version   BIGINT       NOT NULL,
    bound_at_ms     BIGINT       NOT NULL,
    expires_at_ms   BIGINT,                      -- only on unmanaged lives
    PRIMARY KEY (user_id, device_id)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE INDEX routes_by_life ON routes (epoch, user_id);
CREATE INDEX routes_by_expiry ON routes (expires_at_ms);

CREATE TABLE lives (
    epoch         BIGINT       NOT NULL PRIMARY KEY,
    gateway_addr  VARCHAR(255) NOT NULL,
    kind          INT          NOT NULL,         -- 1 managed, 2 unmanaged
    alive         INT          NOT NULL,
    draining      INT          NOT NULL DEFAULT 0,
    lease_until   BIGINT       NOT NULL DEFAULT 0,
    last_beat     BIGINT       NOT NULL DEFAULT 0,
    ended_at      BIGINT       NOT NULL DEFAULT 0,
    end_reason    INT          NOT NULL DEFAULT 0,
    swept_at      BIGINT       NOT NULL DEFAULT 0,
    attached_node VARCHAR(64)  NOT NULL DEFAULT '',
    attach_no     BIGINT       NOT NULL DEFAULT 0,
    region        VARCHAR(128) /*! CHARACTER SET utf8mb4 */ NOT NULL DEFAULT '',
    capacity      BIGINT       NOT NULL DEFAULT 0,
    connections   BIGINT       NOT NULL DEFAULT 0,
    load_average  DOUBLE       NOT NULL DEFAULT 0,
    labels        BLOB
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE INDEX lives_by_gateway ON lives (gateway_addr);

CREATE TABLE nodes (
    node_id VARCHAR(64)  NOT NULL PRIMARY KEY,
    addr    VARCHAR(255) NOT NULL,
    seen_at BIGINT       NOT NULL
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

-- One row per committed batch until what it changed is shown to the outside (caches, channels).
CREATE TABLE outbox (
    id            VARCHAR(36) NOT NULL PRIMARY KEY,
    node_id       VARCHAR(64) NOT NULL,
    created       BIGINT      NOT NULL,
    claimed_by    VARCHAR(64) NOT NULL DEFAULT '',
    claimed_until BIGINT      NOT NULL DEFAULT 0,
    body          MEDIUMBLOB  NOT NULL
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE TABLE inbox (
    user_id      BIGINT       NOT NULL,
    seq          BIGINT       NOT NULL,
    message_id   VARCHAR(128) NOT NULL,
    message_type VARCHAR(64)  NOT NULL,
    stored_at    BIGINT       NOT NULL,
    expires_at   BIGINT       NOT NULL,
    device_ids   BLOB,                           -- NULL: any device
    is_binary    INT          NOT NULL,
    body         MEDIUMBLOB   NOT NULL,
    PRIMARY KEY (user_id, seq)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE UNIQUE INDEX inbox_by_message ON inbox (user_id, message_id);
CREATE INDEX inbox_by_expiry ON inbox (expires_at);

-- One row: what all nodes agree on.
CREATE TABLE cluster (
    id               INT         NOT NULL PRIMARY KEY,
    store_id         VARCHAR(36) NOT NULL,
    generation       BIGINT      NOT NULL DEFAULT 1,
    cache_identity   VARCHAR(128) NOT NULL DEFAULT '',
    next_epoch       BIGINT      NOT NULL DEFAULT 0,
    last_beat        BIGINT      NOT NULL DEFAULT 0,
    continuous_since BIGINT      NOT NULL DEFAULT 0,
    hold_until       BIGINT      NOT NULL DEFAULT 0,
    hold_rearm       BIGINT      NOT NULL DEFAULT 0,
    hold_reason      VARCHAR(255) /*! CHARACTER SET utf8mb4 */ NOT NULL DEFAULT ''
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

-- Work that one node at a time does.
CREATE TABLE jobs (
    name    VARCHAR(64) NOT NULL PRIMARY KEY,
    node_id VARCHAR(64) NOT NULL,
    until   BIGINT      NOT NULL
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;
