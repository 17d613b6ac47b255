package jobspec

import (
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// perNode refuses what a group that runs on every node has no use for (Nomad:
// https://developer.hashicorp.com/nomad/docs/concepts/scheduling/schedulers).
func (c *checker) perNode(job *api.Job, jobType string, in *api.TaskGroup, path string) {
	if n := or(in.Count, 1); n > 1 {
		c.fault(join(path, "count"), "is %d; a job of type %s runs once on every node that may run it", n, jobType)
	}
	refuse := func(at, block string, set bool) {
		if set {
			c.fault(at, "jobs of type %s have no %s block: they run on every node that may run them", jobType, block)
		}
	}
	refuse(join(path, "reschedule"), "reschedule", in.ReschedulePolicy != nil || job.Reschedule != nil)
	for _, block := range []struct {
		at               string
		affinity, spread bool
	}{
		{"", len(job.Affinities) > 0, len(job.Spreads) > 0},
		{path, len(in.Affinities) > 0, len(in.Spreads) > 0},
	} {
		refuse(join(block.at, "affinity"), "affinity", block.affinity)
		refuse(join(block.at, "spread"), "spread", block.spread)
	}
	for _, t := range present(in.Tasks) {
		refuse(join(path, join("task", t.Name))+".affinity", "affinity", len(t.Affinities) > 0)
	}
}

// stagger reads what an update block says to a job that runs on every node: how many
// allocations are replaced at a time, and how long until the next ones. Without a block
// all are replaced at once.
func (c *checker) stagger(job, group *api.UpdateStrategy, path string) *cluster.UpdateStrategy {
	if job.Empty() && group.Empty() {
		return nil
	}
	u := &cluster.UpdateStrategy{MaxParallel: 1, Stagger: 30 * time.Second}
	for _, in := range []*api.UpdateStrategy{job, group} {
		if in.Empty() {
			continue
		}
		u.MaxParallel, u.Stagger = or(in.MaxParallel, u.MaxParallel), or(in.Stagger, u.Stagger)
		if in.HealthCheck != nil || in.MinHealthyTime != nil || in.HealthyDeadline != nil || in.ProgressDeadline != nil {
			c.warn(path, "jobs that run on every node have no deployments: of the block only max_parallel and stagger count")
		}
	}
	if u.MaxParallel < 1 {
		c.fault(join(path, "max_parallel"), "is %d; it must be at least 1", u.MaxParallel)
	}
	if u.Stagger <= 0 {
		c.fault(join(path, "stagger"), "must be above zero")
	}
	return u
}
