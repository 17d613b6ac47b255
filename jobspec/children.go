package jobspec

import (
	"slices"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/cron"
)

// Bounds of jobs with children.
const (
	MaxCrons        = 64  // expressions of a periodic job
	MaxDispatchMeta = 256 // keys that a dispatch must give, and as many that it may
)

// noChild refuses what was read as a child of a job: the state makes those.
func (c *checker) noChild(in *api.Job) {
	if parent := or(in.ParentID, ""); parent != "" || in.Dispatched || len(in.Payload) > 0 {
		c.fault(jobPath, "is a child of job %s, and is not registered by itself: dispatch or launch that one, or leave out ParentID, Dispatched and Payload", quote(parent))
	}
}

// periodic fills in the defaults of a periodic block (Nomad: periodic).
func (c *checker) periodic(jobType string, in *api.PeriodicConfig) *cluster.PeriodicConfig {
	if in == nil {
		return nil
	}
	const path = "periodic"
	c.onlyBatch(jobType, path)
	p := &cluster.PeriodicConfig{
		Enabled: or(in.Enabled, true), SpecType: or(in.SpecType, cluster.PeriodicSpecCron), Spec: or(in.Spec, ""), Specs: slices.Clone(in.Specs),
		ProhibitOverlap: or(in.ProhibitOverlap, false), TimeZone: or(in.TimeZone, ""),
	}
	if p.TimeZone == "" {
		p.TimeZone = "UTC"
	}
	if len(p.Specs) == 0 {
		p.Specs = nil
	}
	c.oneOf(p.SpecType, join(path, "SpecType"), cluster.PeriodicSpecCron)
	if _, err := cron.Zone(p.TimeZone); err != nil {
		c.fault(join(path, "time_zone"), "%v", err)
	}
	one, several := join(path, "cron"), join(path, "crons")
	switch {
	case p.Spec != "" && p.Specs != nil:
		c.fault(one, "cannot stand beside crons; write all expressions there")
	case p.Spec == "" && p.Specs == nil:
		c.fault(path, "has neither cron nor crons: it says no time")
	case len(p.Specs) > MaxCrons:
		c.fault(several, "holds %d expressions; at most %d are allowed", len(p.Specs), MaxCrons)
		return p
	}
	if p.Spec != "" {
		c.cron(p.Spec, one)
	}
	for _, expr := range p.Specs {
		c.cron(expr, several)
	}
	return p
}

func (c *checker) cron(expr, path string) {
	if _, err := cron.Parse("", expr); err != nil {
		c.fault(path, "%v", err)
	}
}

// parameterized fills in the defaults of a parameterized block (Nomad: parameterized).
func (c *checker) parameterized(jobType string, in *api.ParameterizedJobConfig) *cluster.ParameterizedJobConfig {
	if in == nil {
		return nil
	}
	const path = "parameterized"
	c.onlyBatch(jobType, path)
	p := &cluster.ParameterizedJobConfig{Payload: in.Payload}
	if p.Payload == "" {
		p.Payload = cluster.PayloadOptional
	}
	c.oneOf(p.Payload, join(path, "payload"), cluster.PayloadOptional, cluster.PayloadRequired, cluster.PayloadForbidden)
	seen := map[string]string{}
	p.MetaRequired = c.dispatchMeta(in.MetaRequired, path, "meta_required", seen)
	p.MetaOptional = c.dispatchMeta(in.MetaOptional, path, "meta_optional", seen)
	return p
}

// dispatchMeta checks the keys that a dispatch gives; seen names the list of those seen before.
func (c *checker) dispatchMeta(keys []string, path, list string, seen map[string]string) []string {
	at := join(path, list)
	if len(keys) > MaxDispatchMeta {
		c.fault(at, "holds %d keys; at most %d are allowed", len(keys), MaxDispatchMeta)
		return nil
	}
	for _, key := range keys {
		switch other := seen[key]; {
		case key == "" || hasControl(key):
			c.fault(at, "%s is no key of meta", quote(key))
		case strings.HasPrefix(key, metaPrefix):
			c.fault(at, "%s cannot be given by a dispatch: keys that begin with %s speak to rxvision", quote(key), metaPrefix)
		case other != "":
			c.fault(at, "%s is in %s already", quote(key), other)
		}
		seen[key] = list
	}
	if len(keys) == 0 {
		return nil
	}
	return slices.Clone(keys)
}

// dispatchPayload checks where a task finds the payload (Nomad: dispatch_payload).
func (c *checker) dispatchPayload(j *cluster.Job, in *api.DispatchPayloadConfig, path string) *cluster.DispatchPayloadConfig {
	if in == nil {
		return nil
	}
	if in.File == "" {
		c.fault(join(path, "file"), "is missing")
	} else {
		c.inside(in.File, join(path, "file"))
	}
	switch {
	case j.ParameterizedJob == nil:
		c.warn(path, "changes nothing in a job without a parameterized block")
	case j.ParameterizedJob.Payload == cluster.PayloadForbidden:
		c.warn(path, "changes nothing where parameterized { payload } is forbidden")
	}
	return &cluster.DispatchPayloadConfig{File: in.File}
}

// onlyBatch refuses a block in jobs that do not end.
func (c *checker) onlyBatch(jobType, path string) {
	if jobType == cluster.JobTypeService || jobType == cluster.JobTypeSystem {
		c.fault(path, "only jobs of type batch and sysbatch have a %s block", path)
	}
}
