-- Where users should go, who may not come, and what a gateway and the database believe of each other.

ALTER TABLE users ADD COLUMN banned_until_ms BIGINT NOT NULL DEFAULT 0;
-- Of (user_id, device_id, conn_id); 0: a node of the last release has written the row.
ALTER TABLE routes ADD COLUMN digest BIGINT NOT NULL DEFAULT 0;
-- One statement, for nodes of the last release name the index; none if it is there already, for it takes minutes on a large
-- table. SQLite, with one node and few gateways, does without.
/*! SET @wider = IF(EXISTS(SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = 'routes'
    AND index_name = 'routes_by_life' AND column_name = 'digest'), 'DO 0',
    'ALTER TABLE routes DROP INDEX routes_by_life, ADD INDEX routes_by_life (epoch, user_id, digest)') */;
/*! PREPARE wider FROM @wider */;
/*! EXECUTE wider */;
/*! DEALLOCATE PREPARE wider */;
ALTER TABLE lives ADD COLUMN weight INT NOT NULL DEFAULT 100;
ALTER TABLE lives ADD COLUMN public_addr VARCHAR(255) NOT NULL DEFAULT '';
ALTER TABLE lives ADD COLUMN login_rate BIGINT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN draining INT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN zone VARCHAR(64) NOT NULL DEFAULT '';

CREATE TABLE drains (
    id          VARCHAR(36) NOT NULL PRIMARY KEY,
    epoch       BIGINT NOT NULL,                 -- of the life that users leave
    state       INT    NOT NULL,
    pass        INT    NOT NULL DEFAULT 0,
    cursor_user BIGINT NOT NULL DEFAULT 0,       -- the last who was asked in this pass
    users       BIGINT NOT NULL DEFAULT 0,       -- who are to go
    remaining   BIGINT NOT NULL DEFAULT 0,       -- who of them are still there
    asked       BIGINT NOT NULL DEFAULT 0,
    unheard     BIGINT NOT NULL DEFAULT 0,
    began_ms    BIGINT NOT NULL,
    ended_ms    BIGINT NOT NULL DEFAULT 0,
    node_id     VARCHAR(64) NOT NULL DEFAULT '', -- that carries it out
    body        MEDIUMBLOB NOT NULL              -- the request
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;

CREATE INDEX drains_by_life ON drains (epoch);
CREATE INDEX drains_by_age ON drains (began_ms);

CREATE TABLE census (
    kind  VARCHAR(16)  NOT NULL,
    name  VARCHAR(255) /*! CHARACTER SET utf8mb4 COLLATE utf8mb4_bin */ NOT NULL,
    users BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (kind, name)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;
