package cluster

import (
	"encoding/json"
	"fmt"
)

// JobVersionTag names a version of a job, which is kept as long as it has the name (Nomad: job tag,
// https://developer.hashicorp.com/nomad/docs/commands/job/tag).
type JobVersionTag struct {
	Name        string
	Description string
	TaggedTime  int64 // unix nanoseconds
}

// Bounds of tags.
const (
	MaxVersionTags    = 32 // of a job: each keeps a version
	MaxTagName        = 128
	MaxTagDescription = 1024
)

// JobVersionByTag returns the version of a job that has the tag; nil: none has.
func (s *Snapshot) JobVersionByTag(ws WatchSet, k JobKey, name string) *Job {
	for _, v := range s.JobVersions(ws, k) {
		if v.VersionTag != nil && v.VersionTag.Name == name {
			return v
		}
	}
	return nil
}

// tagVersion gives a version a tag, in place of the one that it had, or takes a tag away.
func (t *tx) tagVersion(c *TagVersion) *Error {
	k := JobKey{c.Namespace, c.JobID}
	current := t.Job(nil, k)
	if current == nil {
		return Errorf(CodeNotFound, "job %q not found", c.JobID)
	}
	tagged := t.JobVersionByTag(nil, k, c.Name)
	if c.Unset {
		if tagged == nil {
			return Errorf(CodeNotFound, "tag %q not found on job %q", c.Name, c.JobID)
		}
		n := *tagged
		n.VersionTag = nil
		t.putVersion(&n)
		return nil
	}
	version := current.Version
	if c.Version != nil {
		version = *c.Version
	}
	v := t.JobVersion(nil, k, version)
	switch {
	case c.Name == "" || len(c.Name) > MaxTagName || len(c.Description) > MaxTagDescription:
		return Errorf(CodeInvalid, "a tag needs a name of 1 to %d bytes, its description may have %d", MaxTagName, MaxTagDescription)
	case v == nil || v.CreateIndex != current.CreateIndex:
		return Errorf(CodeNotFound, "job %q in namespace %q at version %d not found", c.JobID, c.Namespace, version)
	case tagged != nil && tagged.Version != version:
		return Errorf(CodeConflict, "tag %q already exists on a different version of job %q: version %d", c.Name, c.JobID, tagged.Version)
	}
	tags := 0
	for _, other := range t.JobVersions(nil, k) {
		if other.VersionTag != nil && other.Version != version {
			tags++
		}
	}
	if tags >= MaxVersionTags {
		return Errorf(CodeConflict, "job %q has %d tagged versions, as many as may be: unset a tag first", c.JobID, tags)
	}
	n := *v
	n.VersionTag = &JobVersionTag{Name: c.Name, Description: c.Description, TaggedTime: t.stamp.Time}
	t.putVersion(&n)
	return nil
}

// Detach makes a job name the model versions that it has pinned, so that an old version that comes back is what it
// was, and not what its aliases mean now.
func (j *Job) Detach() error {
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if t.Model == nil || t.Model.Version == 0 {
				continue
			}
			ref := fmt.Sprintf("%s:%d", t.Model.Name, t.Model.Version)
			config := map[string]json.RawMessage{} // numbers stay as they are written
			err := json.Unmarshal(t.Config, &config)
			if err == nil {
				config["model"], err = json.Marshal(ref)
			}
			if err == nil {
				t.Config, err = json.Marshal(config)
			}
			if err != nil {
				return fmt.Errorf("config of task %s: %w", t.Name, err)
			}
			t.Model.Reference, t.Model.Alias = ref, ""
		}
	}
	return nil
}
