package scheduler

import (
	"sync"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// DryRuns answers what would happen if jobs were registered, on any server. The zero value is ready and may be shared.
type DryRuns struct {
	mu    sync.Mutex
	tally place.Tally
}

// DryRun is the method of a new DryRuns.
func DryRun(snap *cluster.Snapshot, job *cluster.Job, now cluster.Time) (*place.Result, error) {
	return new(DryRuns).DryRun(snap, job, now)
}

// DryRun says what would happen if the job were registered now (Nomad: job
// plan): annotations, placements and failures. It changes nothing and works on
// any server. The job is a complete specification as jobspec makes it; what the
// state sets when it registers a job, models included, DryRun sets in a copy.
// The error names every model that is not there. Of a job with children it says what
// would become of a child.
func (r *DryRuns) DryRun(snap *cluster.Snapshot, job *cluster.Job, now cluster.Time) (*place.Result, error) {
	j, err := asRegistered(snap, job)
	if err != nil {
		return nil, err
	}
	j.Periodic, j.ParameterizedJob = nil, nil
	return r.view(snap).Plan(place.Input{Job: j, Eval: dryEval(j), Now: now, NewID: dryIDs()}), nil
}
