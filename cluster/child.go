package cluster

import (
	"slices"
	"strings"
)

// Some jobs have no allocations of their own but run through other jobs, their children:
// a parameterized job through those that are dispatched from it, a periodic one through
// those that are launched at its times. A child is a job like any other; it is a copy of
// its parent as that was then, and does not change or end with it. What is dispatched from a
// job that is both is periodic itself.
//
// https://developer.hashicorp.com/nomad/docs/job-specification/parameterized
// https://developer.hashicorp.com/nomad/docs/job-specification/periodic

// MaxPayload bounds the payload of a dispatch, in bytes, as Nomad does.
const MaxPayload = 16 << 10

// Bounds of what else a dispatch gives, in bytes.
const (
	MaxIDPrefix         = 128
	MaxIdempotencyToken = 1024
)

// Values of ParameterizedJobConfig.Payload as Nomad's API names them.
const (
	PayloadOptional  = "optional"
	PayloadRequired  = "required"
	PayloadForbidden = "forbidden"
)

// PeriodicSpecCron is the one kind of times that a periodic job has.
const PeriodicSpecCron = "cron"

// PeriodicConfig says when a job is launched (Nomad: periodic block).
type PeriodicConfig struct {
	Enabled         bool // false: neither at its times nor by hand
	SpecType        string
	Spec            string   // one cron expression; ""
	Specs           []string // … or several: the earliest counts
	ProhibitOverlap bool     // a time at which a child has not ended yet is skipped
	TimeZone        string   // that the expressions are read in, as in the IANA database
}

// Crons returns the cron expressions.
func (p *PeriodicConfig) Crons() []string {
	if p.Spec != "" {
		return []string{p.Spec}
	}
	return p.Specs
}

func (p *PeriodicConfig) equal(o *PeriodicConfig) bool {
	return p == o || p != nil && o != nil && string(Marshal(p)) == string(Marshal(o))
}

// ParameterizedJobConfig says what a dispatch gives to a job (Nomad: parameterized block).
type ParameterizedJobConfig struct {
	Payload      string   // optional, required or forbidden
	MetaRequired []string // keys of meta that a dispatch must give
	MetaOptional []string // … and those that it may give
}

// DispatchPayloadConfig says where a task finds the payload (Nomad: dispatch_payload block).
type DispatchPayloadConfig struct {
	File string // relative to the task's local directory
}

// ChildrenSummary counts a job's children by their status. Those that were forgotten stay among the dead.
type ChildrenSummary struct{ Pending, Running, Dead int64 }

func (c *ChildrenSummary) add(status string, n int64) {
	switch status {
	case JobStatusPending:
		c.Pending += n
	case JobStatusRunning:
		c.Running += n
	case JobStatusDead:
		c.Dead += n
	}
}

// PeriodicLaunch is how far a periodic job has come: its next time is the first after Launch.
type PeriodicLaunch struct {
	Namespace   string
	ID          string
	Launch      int64 // unix nanoseconds: the last time that was due, else when its times began to count
	CreateIndex uint64
	ModifyIndex uint64
}

// Parameterized says whether the job runs only as what is dispatched from it.
func (j *Job) Parameterized() bool { return j.ParameterizedJob != nil && !j.Dispatched }

// Spawns says whether the job has children instead of allocations.
func (j *Job) Spawns() bool { return j.Periodic != nil || j.Parameterized() }

// Launches says whether the job is to be launched at its times: those of a parameterized
// job are for what is dispatched from it.
func (j *Job) Launches() bool {
	return j.Periodic != nil && j.Periodic.Enabled && !j.Stop && !j.Parameterized()
}

// needsChildren says whether the job has to do with children.
func (j *Job) needsChildren() bool {
	return j.Periodic != nil || j.ParameterizedJob != nil || slices.ContainsFunc(j.TaskGroups, func(g *TaskGroup) bool {
		return g != nil && slices.ContainsFunc(g.Tasks, func(t *Task) bool { return t != nil && t.DispatchPayload != nil })
	})
}

// parent is the key of a child's parent.
func (j *Job) parent() JobKey { return JobKey{j.Namespace, j.ParentID} }

// DispatchJob creates a child of a parameterized job, PARENT/dispatch-SECONDS-XXXXXXXX, with
// its evaluation. With a token that a child of the job has already it creates nothing and
// gives that one, without an evaluation.
type DispatchJob struct {
	Stamp
	Namespace, JobID string
	Payload          []byte
	Meta             map[string]string // what the parameterized block allows; it joins the job's
	IDPrefix         string            // of the part of the child's ID behind dispatch-, "" for none
	Priority         int               // 0: the job's
	IdempotencyToken string
	EvalID           string
}

// LaunchJob creates a child of a periodic job, PARENT/periodic-SECONDS, with its evaluation.
// At is the time that is due, in unix nanoseconds, which counts once; a child that has not
// ended may let it pass (PeriodicConfig.ProhibitOverlap). At 0 is the request of a user: it is
// due now, whatever runs, and the job's times stay as they are.
type LaunchJob struct {
	Stamp
	Namespace, JobID string
	At               int64
	EvalID           string
}

func (*DispatchJob) kind() Kind { return KindDispatchJob }
func (*LaunchJob) kind() Kind   { return KindLaunchJob }

// LaunchingJobs returns the jobs that are launched at times, by namespace and ID.
func (s *Snapshot) LaunchingJobs(ws WatchSet) []*Job {
	return list[Job](s.txn, ws, TableJobs, "launches_prefix", "")
}

// Launch returns how far a periodic job has come; nil for other jobs.
func (s *Snapshot) Launch(ws WatchSet, k JobKey) *PeriodicLaunch {
	return first[PeriodicLaunch](s.txn, ws, TablePeriodicLaunches, "id", k.Namespace, k.ID)
}

// Children returns the jobs that were dispatched or launched from a job, by ID.
func (s *Snapshot) Children(ws WatchSet, k JobKey) (children []*Job) {
	for _, j := range s.Jobs(ws, k.Namespace, k.ID+"/") {
		if j.ParentID == k.ID {
			children = append(children, j)
		}
	}
	return children
}

// Supports gives an error if a server of the region does not know what the command needs:
// that server would stop at it.
func (s *Snapshot) Supports(c Command) error {
	need := needs(c)
	if need == 0 {
		return nil
	}
	var older []string
	for _, server := range s.Servers(nil) {
		if !server.Left && server.Rules < need {
			older = append(older, server.Name)
		}
	}
	if older == nil {
		return nil
	}
	return Errorf(CodeUnsupported, "not all servers of this region know this kind of job yet: upgrade %s first", strings.Join(older, ", "))
}
