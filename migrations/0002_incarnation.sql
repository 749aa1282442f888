-- Which process of a node it is: two with one name are told apart.
ALTER TABLE nodes ADD COLUMN incarnation VARCHAR(36) NOT NULL DEFAULT '';
