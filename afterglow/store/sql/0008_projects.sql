-- Projects are managed, and keys may do some things and not others.

ALTER TABLE projects ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE projects ADD COLUMN archived_at BIGINT;              -- from then on its keys are refused
ALTER TABLE projects ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'; -- limits, retention and budget, JSON

ALTER TABLE api_keys ADD COLUMN scopes TEXT NOT NULL DEFAULT 'read,write';
ALTER TABLE api_keys ADD COLUMN expires_at BIGINT;               -- from then on it is refused
ALTER TABLE api_keys ADD COLUMN last_used_at BIGINT;             -- to the minute
ALTER TABLE api_keys ADD COLUMN limits TEXT NOT NULL DEFAULT '{}'; -- beside those of its project, JSON
