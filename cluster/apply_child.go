package cluster

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
)

// errRejecting refuses new jobs while the operators want none.
var errRejecting = Errorf(CodeForbidden, "Job registration, dispatch, and scale are disabled by the scheduler configuration")

func (t *tx) dispatchJob(c *DispatchJob) (Result, *Error) {
	if t.SchedulerConfig(nil).RejectJobRegistration {
		return Result{}, errRejecting
	}
	parent := t.Job(nil, JobKey{c.Namespace, c.JobID})
	switch {
	case parent == nil:
		return Result{}, Errorf(CodeNotFound, "parameterized job %q not found", c.JobID)
	case !parent.Parameterized():
		return Result{}, Errorf(CodeInvalid, "job %q is not a parameterized job", c.JobID)
	case parent.Stop:
		return Result{}, Errorf(CodeInvalid, "job %q is stopped", c.JobID)
	}
	if faults := c.faults(parent); faults != nil {
		return Result{}, Errorf(CodeInvalid, "%s", strings.Join(faults, "\n"))
	}
	if c.IdempotencyToken != "" {
		if j := first[Job](t.txn, nil, TableJobs, "token", c.Namespace, c.JobID, c.IdempotencyToken); j != nil {
			return Result{JobID: j.ID, JobModifyIndex: j.JobModifyIndex, Version: j.Version}, nil
		}
	}
	child := *parent
	child.Dispatched, child.Payload, child.DispatchIdempotencyToken = true, c.Payload, c.IdempotencyToken
	if c.Priority != 0 {
		child.Priority = c.Priority
	}
	if len(c.Meta) > 0 {
		child.Meta = make(map[string]string, len(parent.Meta)+len(c.Meta))
		maps.Copy(child.Meta, parent.Meta)
		maps.Copy(child.Meta, c.Meta)
	}
	prefix := ""
	if c.IDPrefix != "" {
		prefix = c.IDPrefix + "-"
	}
	for child.ID == parent.ID || t.Job(nil, child.Key()) != nil { // of four thousand in a second, two may have the same 8 digits every ten minutes
		child.ID = fmt.Sprintf("%s/dispatch-%s%d-%s", parent.ID, prefix, t.stamp.Time/int64(time.Second), t.newID()[:8])
	}
	return t.spawn(parent, &child, TriggerJobRegister, c.EvalID), nil
}

// faults names all that a job does not take of a dispatch.
func (c *DispatchJob) faults(j *Job) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	p := j.ParameterizedJob
	switch {
	case len(c.Payload) > MaxPayload:
		fault("Payload exceeds maximum size; %d > %d bytes", len(c.Payload), MaxPayload)
	case len(c.Payload) == 0 && p.Payload == PayloadRequired:
		fault("Dispatch did not provide the payload that job %q requires", j.ID)
	case len(c.Payload) > 0 && p.Payload == PayloadForbidden:
		fault("Dispatch provided a payload, which job %q forbids", j.ID)
	}
	var missing, unknown []string
	for _, key := range p.MetaRequired {
		if _, ok := c.Meta[key]; !ok {
			missing = append(missing, key)
		}
	}
	for _, key := range sortedKeys(c.Meta) {
		if !slices.Contains(p.MetaRequired, key) && !slices.Contains(p.MetaOptional, key) {
			unknown = append(unknown, key)
		}
	}
	if missing != nil {
		fault("Dispatch did not provide required meta keys: %v", missing)
	}
	if unknown != nil {
		fault("Dispatch provided meta keys that job %q does not know: %v", j.ID, unknown)
	}
	if c.Priority < 0 || c.Priority > 100 {
		fault("Dispatch priority is %d; it must be between 1 and 100, or 0 for the job's", c.Priority)
	}
	if len(c.IDPrefix) > MaxIDPrefix || strings.ContainsFunc(c.IDPrefix, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == '/' }) {
		fault("Dispatch ID prefix %.40q must have at most %d bytes, and no space, slash or control character", c.IDPrefix, MaxIDPrefix)
	}
	if len(c.IdempotencyToken) > MaxIdempotencyToken {
		fault("Dispatch idempotency token has %d bytes; at most %d are allowed", len(c.IdempotencyToken), MaxIdempotencyToken)
	}
	return faults
}

func (t *tx) launchJob(c *LaunchJob) (Result, *Error) {
	key := JobKey{c.Namespace, c.JobID}
	parent := t.Job(nil, key)
	switch {
	case parent == nil:
		return Result{}, Errorf(CodeNotFound, "periodic job %q not found", c.JobID)
	case parent.Periodic == nil:
		return Result{}, Errorf(CodeInvalid, "job %q is not a periodic job", c.JobID)
	case parent.Parameterized():
		return Result{}, Errorf(CodeInvalid, "job %q is parameterized: only what is dispatched from it can be launched", c.JobID)
	case parent.Stop:
		return Result{}, Errorf(CodeInvalid, "job %q is stopped", c.JobID)
	case !parent.Periodic.Enabled:
		return Result{}, Errorf(CodeInvalid, "periodic job %q is not enabled", c.JobID)
	}
	at := c.At
	if at == 0 {
		at = t.stamp.Time
	} else {
		last := *t.Launch(nil, key)
		if at <= last.Launch {
			return Result{}, nil // another leader was faster
		}
		last.Launch, last.ModifyIndex = at, t.index
		t.put(TablePeriodicLaunches, &last)
		if n := t.Summary(nil, key).Children; parent.Periodic.ProhibitOverlap && n.Pending+n.Running > 0 {
			return Result{}, nil
		}
	}
	child := *parent
	child.Periodic, child.DispatchIdempotencyToken = nil, ""
	child.ID = fmt.Sprintf("%s/periodic-%d", parent.ID, at/int64(time.Second))
	if same := t.Job(nil, child.Key()); same != nil { // of the same second: launched by hand, or at its time
		t.evalJob(same, TriggerPeriodicJob, c.EvalID, 0)
		return Result{JobID: same.ID, EvalID: c.EvalID, JobModifyIndex: same.JobModifyIndex, Version: same.Version}, nil
	}
	return t.spawn(parent, &child, TriggerPeriodicJob, c.EvalID), nil
}

// spawn creates a child, a copy of its parent with what is its own, and its evaluation.
func (t *tx) spawn(parent, child *Job, trigger, evalID string) Result {
	child.ParentID, child.Name, child.StatusDescription = parent.ID, child.ID, ""
	child = t.putJob(child, nil)
	res := Result{JobID: child.ID, JobModifyIndex: child.JobModifyIndex, Version: child.Version}
	if !child.Spawns() {
		t.evalJob(child, trigger, evalID, 0)
		res.EvalID = evalID
	}
	return res
}

// checkKind refuses a job that would become periodic or parameterized, or cease to be: what
// runs of it would be lost from sight. A child stays what it was dispatched or launched as.
func checkKind(j, old *Job) *Error {
	kind := ""
	switch {
	case old == nil:
	case old.ParentID != j.ParentID:
		return Errorf(CodeInvalid, "job %q is a child of job %q and cannot be registered as another: change that one", j.ID, old.ParentID)
	case (old.Periodic == nil) != (j.Periodic == nil):
		kind = "periodic"
	case old.Parameterized() != j.Parameterized():
		kind = "parameterized"
	case old.Type != j.Type && old.PerNode():
		kind = old.Type
	case old.Type != j.Type && j.PerNode():
		kind = j.Type
	}
	if kind == "" {
		return nil
	}
	return Errorf(CodeInvalid, "job %q cannot be changed into or from a %s job: purge it first (nomad job stop -purge %s)", j.ID, kind, j.ID)
}

// trackLaunches lets a periodic job's times count from now on where they did not count
// before: what passed meanwhile was not missed.
func (t *tx) trackLaunches(j, old *Job) {
	if j.Periodic == nil || old != nil && old.Launches() && old.Periodic.equal(j.Periodic) {
		return
	}
	l := &PeriodicLaunch{Namespace: j.Namespace, ID: j.ID, Launch: t.stamp.Time, CreateIndex: t.index, ModifyIndex: t.index}
	if before := t.Launch(nil, j.Key()); before != nil {
		l.CreateIndex = before.CreateIndex
	}
	t.put(TablePeriodicLaunches, l)
}

// countChild moves a child from one status to another in its parent's summary; "" stands for "not there".
func (t *tx) countChild(j *Job, from, to string) {
	if j.ParentID == "" || from == to {
		return
	}
	s := t.Summary(nil, j.parent())
	if s == nil || s.Children == nil {
		return // the parent was purged
	}
	n, c := *s, *s.Children
	c.add(from, -1)
	c.add(to, 1)
	n.Children, n.ModifyIndex = &c, t.index
	t.put(TableSummaries, &n)
}

// childrenOf counts the children that a new job has: those of an earlier one of its ID.
func (t *tx) childrenOf(j *Job) *ChildrenSummary {
	if !j.Spawns() {
		return nil
	}
	c := new(ChildrenSummary)
	for _, child := range t.Children(nil, j.Key()) {
		c.add(child.Status, 1)
	}
	return c
}
