package scheduler

import (
	"errors"
	"fmt"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// DryRun says what would happen if the job were registered now (Nomad: job
// plan): annotations, placements and failures. It changes nothing and works on
// any server. The job is a complete specification as jobspec makes it; what the
// state sets when it registers a job, models included, DryRun sets in a copy.
// The error names every model that is not there. Of a job with children it says what
// would become of a child.
func DryRun(snap *cluster.Snapshot, job *cluster.Job, now cluster.Time) (*place.Result, error) {
	j := cluster.Clone(job)
	var faults []error
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if t.Model == nil {
				continue
			}
			v, err := snap.ResolveModel(t.Model)
			if err != nil {
				faults = append(faults, fmt.Errorf("group.%s.task.%s.config.model: %w", g.Name, t.Name, err))
				continue
			}
			t.Model.Version, t.Model.Digest, t.Model.Size = v.Version, v.Digest, v.Size
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	next := snap.Index(nil) + 1
	j.Version, j.CreateIndex, j.JobModifyIndex = 0, next, next
	if old := snap.Job(nil, j.Key()); old != nil {
		j.CreateIndex = old.CreateIndex
		if cluster.SpecEqual(j, old) {
			j.Version, j.JobModifyIndex = old.Version, old.JobModifyIndex
		} else {
			j.Version = old.Version + 1
		}
	}
	j.Periodic, j.ParameterizedJob = nil, nil
	eval := &cluster.Evaluation{
		ID: "dry-run", Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: cluster.TriggerJobRegister, JobModifyIndex: j.JobModifyIndex, Status: cluster.EvalStatusPending,
	}
	ids := 0
	newID := func() string { ids++; return fmt.Sprintf("dry-run-%d", ids) }
	var cache place.Cache
	cache.Expect(mixOf(snap))
	return cache.View(snap).Plan(place.Input{Job: j, Eval: eval, Now: now, NewID: newID}), nil
}
