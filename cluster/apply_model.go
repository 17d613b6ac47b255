package cluster

import "regexp"

var (
	modelName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)
	aliasName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,63}$`)
	digestRe  = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

// ValidModelName says what is wrong with a model name, nil when it is good.
func ValidModelName(name string) error {
	if err := checkModelName(name); err != nil {
		return err
	}
	return nil
}

func checkModelName(name string) *Error {
	if !modelName.MatchString(name) {
		return Errorf(CodeInvalid, "invalid model name %q: use 1 to 128 letters, digits, '_', '.', '-', first a letter or digit", name)
	}
	return nil
}

// ValidAlias says what is wrong with an alias, nil when it is good.
func ValidAlias(alias string) error {
	if err := checkAlias(alias); err != nil {
		return err
	}
	return nil
}

func checkAlias(alias string) *Error {
	if !aliasName.MatchString(alias) {
		return Errorf(CodeInvalid, "invalid alias %q: use 1 to 64 letters, digits, '_', '-', first a letter", alias)
	}
	return nil
}

func (t *tx) createModelVersion(c *CreateModelVersion) (Result, *Error) {
	if c.Version == nil {
		return Result{}, Errorf(CodeInvalid, "model version is missing")
	}
	if err := checkModelName(c.Version.Model); err != nil {
		return Result{}, err
	}
	if !digestRe.MatchString(c.Version.Digest) {
		return Result{}, Errorf(CodeInvalid, "invalid digest %q: want sha256: and 64 hex digits", c.Version.Digest)
	}
	m := t.Model(nil, c.Version.Model)
	if m == nil {
		m = &Model{Name: c.Version.Model, Description: c.Description, CreateTime: t.stamp.Time, CreateIndex: t.index}
	}
	for _, v := range t.ModelVersions(nil, m.Name) {
		if v.Digest == c.Version.Digest {
			return Result{Version: v.Version}, nil
		}
	}
	v := Clone(c.Version)
	if v.Origin != nil {
		if err := t.resolveOrigin(v.Origin); err != nil {
			return Result{}, err
		}
	}
	n := *m
	n.LatestVersion++
	n.ModifyIndex = t.index
	if c.Description != "" {
		n.Description = c.Description
	}
	v.Version, v.CreateTime, v.CreateIndex, v.ModifyIndex = n.LatestVersion, t.stamp.Time, t.index, t.index
	t.put(TableModels, &n)
	t.put(TableModelVersions, v)
	return Result{Version: v.Version}, nil
}

// setAlias moves an alias and, in the same entry, registers a new version of
// every running job that follows it.
func (t *tx) setAlias(c *SetAlias) *Error {
	m := t.Model(nil, c.Model)
	if m == nil {
		return Errorf(CodeNotFound, "model %q is not registered", c.Model)
	}
	if err := checkAlias(c.Alias); err != nil {
		return err
	}
	if c.Version != 0 && t.ModelVersion(nil, c.Model, c.Version) == nil {
		return Errorf(CodeNotFound, "model %q has no version %d; the newest is %d", c.Model, c.Version, m.LatestVersion)
	}
	followers := t.aliasFollowers(c.Model, c.Alias)
	if c.Version == 0 && len(followers) > 0 {
		return Errorf(CodeConflict, "alias %q of model %q is followed by job %q: stop the job or point it elsewhere first", c.Alias, c.Model, followers[0].ID)
	}
	n := *m
	n.Aliases = map[string]uint64{}
	for k, v := range m.Aliases {
		n.Aliases[k] = v
	}
	if c.Version == 0 {
		delete(n.Aliases, c.Alias)
	} else {
		n.Aliases[c.Alias] = c.Version
	}
	n.ModifyIndex = t.index
	t.put(TableModels, &n)
	for _, old := range followers {
		j := Clone(old)
		if refused := t.pinModels(j); refused != nil {
			return refused
		}
		if SpecEqual(j, old) {
			continue
		}
		if j = t.putJob(j, old); !j.Spawns() {
			t.evalJob(j, TriggerJobRegister, t.newID(), 0)
		}
	}
	return nil
}

// aliasFollowers are the jobs that follow an alias: children keep what their parent had then.
func (s *Snapshot) aliasFollowers(model, alias string) []*Job {
	var out []*Job
	for _, j := range s.Jobs(nil, "*", "") {
		if !j.Stop && j.ParentID == "" && followsAlias(j, model, alias) {
			out = append(out, j)
		}
	}
	return out
}

func followsAlias(j *Job, model, alias string) bool {
	for _, g := range j.TaskGroups {
		for _, task := range g.Tasks {
			if r := task.Model; r != nil && r.Name == model && r.Alias == alias {
				return true
			}
		}
	}
	return false
}
