-- Which database server the beats were written to last: another one may lack what was acknowledged. Empty: nobody said.

ALTER TABLE cluster ADD COLUMN server VARCHAR(255) NOT NULL DEFAULT '';
