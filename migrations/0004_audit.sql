-- Who did what as an operator, who was denied what, and which secrets were read again.
CREATE TABLE audit (
    at_ms     BIGINT        NOT NULL,
    node_id   VARCHAR(64)   NOT NULL,
    seq       BIGINT        NOT NULL,            -- tells rows of one millisecond and node apart
    who       VARCHAR(255)  /*! CHARACTER SET utf8mb4 */ NOT NULL,
    role      VARCHAR(16)   NOT NULL,
    from_addr VARCHAR(64)   NOT NULL,
    action    VARCHAR(128)  NOT NULL,
    target    VARCHAR(1000) /*! CHARACTER SET utf8mb4 */ NOT NULL,
    args      VARCHAR(1000) /*! CHARACTER SET utf8mb4 */ NOT NULL,
    outcome   VARCHAR(16)   NOT NULL,
    reason    VARCHAR(1000) /*! CHARACTER SET utf8mb4 */ NOT NULL,
    PRIMARY KEY (at_ms, node_id, seq)
) /*! ENGINE = InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;
