package cluster

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// MaxJobVersions bounds the kept versions of a job; the newest stable one stays
// beyond that.
const MaxJobVersions = 6

// SpecEqual says whether two jobs ask for the same: everything but what the
// state itself sets. Pinned models count; Stop counts.
func SpecEqual(a, b *Job) bool {
	return a == b || sameSpec(a, b) || bytes.Equal(specBytes(a), specBytes(b))
}

// sameSpec is true for jobs that share the parts of one specification, as the records of a job do while nobody
// registers it anew. It is quick; false says nothing.
func sameSpec(a, b *Job) bool {
	return a.Region == b.Region && a.Namespace == b.Namespace && a.ID == b.ID && a.Name == b.Name && a.Type == b.Type && a.Priority == b.Priority &&
		a.AllAtOnce == b.AllAtOnce && a.NodePool == b.NodePool && a.Stop == b.Stop && len(a.TaskGroups) > 0 && slices.Equal(a.TaskGroups, b.TaskGroups) &&
		slices.Equal(a.Datacenters, b.Datacenters) && slices.Equal(a.Constraints, b.Constraints) && maps.Equal(a.Meta, b.Meta) &&
		slices.Equal(a.Affinities, b.Affinities) && slices.Equal(a.Spreads, b.Spreads) &&
		a.Periodic == b.Periodic && a.ParameterizedJob == b.ParameterizedJob && a.ParentID == b.ParentID && a.Dispatched == b.Dispatched &&
		a.DispatchIdempotencyToken == b.DispatchIdempotencyToken && bytes.Equal(a.Payload, b.Payload)
}

func specBytes(j *Job) []byte {
	c := *j
	c.Status, c.StatusDescription, c.Stable = "", "", false
	c.Version, c.SubmitTime = 0, 0
	c.CreateIndex, c.ModifyIndex, c.JobModifyIndex = 0, 0, 0
	c.VersionTag = nil
	return Marshal(&c)
}

func (t *tx) registerJob(c *RegisterJob) (Result, *Error) {
	if c.Job == nil || c.Job.ID == "" || len(c.Job.TaskGroups) == 0 {
		return Result{}, Errorf(CodeInvalid, "job registration lacks a job, its ID or its groups")
	}
	if t.SchedulerConfig(nil).RejectJobRegistration {
		return Result{}, errRejecting
	}
	if refused := t.checkTenant(c.Job); refused != nil {
		return Result{}, refused
	}
	j := c.Job
	old := t.Job(nil, j.Key())
	if refused := checkModifyIndex(c, old); refused != nil {
		return Result{}, refused
	}
	if refused := checkKind(j, old); refused != nil {
		return Result{}, refused
	}
	if refused := t.pinModels(j); refused != nil {
		return Result{}, refused
	}
	if t.stamp.Rules < rulesPreferences {
		j.forgetPreferences()
	}
	if c.PreserveCounts && old != nil {
		for _, g := range j.TaskGroups {
			if og := old.Group(g.Name); og != nil {
				g.Count = og.Count
			}
		}
	}
	j = t.putJob(j, old)
	if c.Submission != nil && c.Submission.Source != "" {
		s := c.Submission
		s.Namespace, s.JobID, s.Version, s.JobModifyIndex = j.Namespace, j.ID, j.Version, j.JobModifyIndex
		t.put(TableSubmissions, s)
	}
	res := Result{JobModifyIndex: j.JobModifyIndex, Version: j.Version}
	if c.EvalID != "" && !j.Spawns() {
		t.evalJob(j, TriggerJobRegister, c.EvalID, c.EvalPriority)
		res.EvalID = c.EvalID
	}
	return res, nil
}

// evalJob creates a pending evaluation; priority 0 means the job's.
func (t *tx) evalJob(j *Job, trigger, id string, priority int) {
	e := t.newEval(j, trigger, id)
	if priority != 0 {
		e.Priority = priority
	}
	t.putEvals([]*Evaluation{e})
}

func checkModifyIndex(c *RegisterJob, old *Job) *Error {
	if !c.EnforceIndex {
		return nil
	}
	const enforcing = "Enforcing job modify index %d: "
	switch {
	case c.JobModifyIndex == 0 && old != nil:
		return Errorf(CodeConflict, enforcing+"job already exists", c.JobModifyIndex)
	case c.JobModifyIndex != 0 && old == nil:
		return Errorf(CodeConflict, enforcing+"job does not exist", c.JobModifyIndex)
	case old != nil && old.JobModifyIndex != c.JobModifyIndex:
		return Errorf(CodeConflict, enforcing+"job exists with conflicting job modify index: %d", c.JobModifyIndex, old.JobModifyIndex)
	}
	return nil
}

// putJob stores j as the job's next version, or keeps the version when the
// specification is the same, and gives the stored record.
func (t *tx) putJob(j, old *Job) *Job {
	j.CreateIndex, j.ModifyIndex, j.JobModifyIndex = t.index, t.index, t.index
	j.Version, j.SubmitTime, j.Status, j.Stable, j.VersionTag = 0, t.stamp.Time, JobStatusPending, false, nil
	if kept := t.JobVersions(nil, j.Key()); old == nil && len(kept) > 0 {
		j.Version = kept[0].Version + 1 // a purged job of this ID still runs: its versions stay what they are
	}
	if old != nil {
		j.CreateIndex, j.Version, j.Status = old.CreateIndex, old.Version+1, old.Status
		if SpecEqual(j, old) {
			j.Version, j.JobModifyIndex, j.Stable, j.SubmitTime = old.Version, old.JobModifyIndex, old.Stable, old.SubmitTime
			j.VersionTag = old.VersionTag
		}
	}
	t.storeJob(j)
	t.trimVersions(j.Key())
	t.ensureSummary(j)
	t.trackLaunches(j, old)
	if old == nil {
		t.countChild(j, "", j.Status)
	}
	t.dirty[j.Key()] = true
	return j
}

// storeJob writes the current version into both tables that hold it.
func (t *tx) storeJob(j *Job) {
	t.put(TableJobs, j)
	t.put(TableJobVersions, j)
}

func (t *tx) trimVersions(k JobKey) {
	versions := t.JobVersions(nil, k) // newest first
	if len(versions) <= MaxJobVersions {
		return
	}
	used := map[uint64]bool{}
	for _, a := range t.AllocsByJob(nil, k) {
		if !a.ClientTerminal() {
			used[a.JobVersion] = true
		}
	}
	stable, named := false, t.Lineage(k)
	for i, v := range versions {
		newestStable := v.Stable && !stable
		stable = stable || v.Stable
		if i < MaxJobVersions || newestStable || used[v.Version] || named.Version(v.Version) || v.VersionTag != nil {
			continue
		}
		t.deleteVersion(v)
	}
}

// resolveModel finds the version that a reference means now, or gives the sentence
// that says why there is none.
func (s *Snapshot) resolveModel(r *ModelRef) (*ModelVersion, string) {
	m := s.Model(nil, r.Name)
	if m == nil {
		return nil, fmt.Sprintf("unknown model %q: push it first with `rxvision model push %s FILE.onnx`", r.Name, r.Name)
	}
	version := m.LatestVersion
	switch {
	case r.Alias != "":
		version = m.Aliases[r.Alias]
		if version == 0 {
			return nil, fmt.Sprintf("model %q has no alias %q", r.Name, r.Alias)
		}
	case strings.Contains(r.Reference, ":"):
		version = r.Version
	}
	v := s.ModelVersion(nil, r.Name, version)
	if v == nil {
		return nil, fmt.Sprintf("model %q has no version %d; the newest is %d", r.Name, version, m.LatestVersion)
	}
	return v, ""
}

// ResolveModel finds the model version that a reference means now; the error is
// one sentence for the user.
func (s *Snapshot) ResolveModel(r *ModelRef) (*ModelVersion, error) {
	v, fault := s.resolveModel(r)
	if v == nil {
		return nil, Errorf(CodeUnknownModel, "%s", fault)
	}
	return v, nil
}

// pinModels resolves the models of a job's onnx tasks, naming every unknown one.
func (t *tx) pinModels(j *Job) *Error {
	var faults []string
	for _, g := range j.TaskGroups {
		for _, task := range g.Tasks {
			if task.Model == nil {
				continue
			}
			v, fault := t.resolveModel(task.Model)
			if v == nil {
				faults = append(faults, fmt.Sprintf("group.%s.task.%s.config.model: %s", g.Name, task.Name, fault))
				continue
			}
			task.Model.Version, task.Model.Digest, task.Model.Size = v.Version, v.Digest, v.Size
		}
	}
	if faults != nil {
		return Errorf(CodeUnknownModel, "%s", strings.Join(faults, "\n"))
	}
	return nil
}

func (t *tx) deregisterJob(c *DeregisterJob) Result {
	key := JobKey{c.Namespace, c.JobID}
	old := t.Job(nil, key)
	if old == nil {
		return Result{}
	}
	if c.NoShutdownDelay {
		t.skipShutdownDelay(key)
	}
	stopped := *old
	j := &stopped
	j.Stop = true
	if c.Purge {
		j.ModifyIndex, j.JobModifyIndex = t.index, t.index
		t.purgeJob(old)
	} else {
		j = t.putJob(j, old)
	}
	res := Result{JobModifyIndex: j.JobModifyIndex, Version: j.Version}
	if c.EvalID != "" && !j.Spawns() {
		t.evalJob(j, TriggerJobDeregister, c.EvalID, c.EvalPriority)
		res.EvalID = c.EvalID
	}
	return res
}

func (t *tx) skipShutdownDelay(k JobKey) {
	yes := true
	for _, a := range t.AllocsByJob(nil, k) {
		if !a.Terminal() {
			a := *a
			a.DesiredTransition.NoShutdownDelay = &yes
			a.ModifyIndex = t.index
			t.put(TableAllocs, &a)
		}
	}
}

// purgeJob forgets the job. Versions that live allocations run stay, so that
// nodes and API can still read what they run; they leave with the allocations.
func (t *tx) purgeJob(j *Job) {
	k := j.Key()
	used := map[uint64]bool{}
	for _, a := range t.AllocsByJob(nil, k) {
		if !a.ClientTerminal() {
			used[a.JobVersion] = true
		}
	}
	named := t.Lineage(k)
	for _, v := range t.JobVersions(nil, k) {
		if named.Version(v.Version) {
			continue
		}
		if s := t.Submission(nil, k, v.Version); s != nil {
			t.delete(TableSubmissions, s)
		}
		if !used[v.Version] {
			t.delete(TableJobVersions, v)
		}
	}
	if s := t.Summary(nil, k); s != nil {
		t.delete(TableSummaries, s)
	}
	if e := t.Scaling(nil, k); e != nil {
		t.delete(TableScalingEvents, e)
	}
	if l := t.Launch(nil, k); l != nil {
		t.delete(TablePeriodicLaunches, l)
	}
	t.countChild(j, j.Status, JobStatusDead)
	t.delete(TableJobs, j)
}

func (t *tx) setJobStability(c *SetJobStability) *Error {
	k := JobKey{c.Namespace, c.JobID}
	v := t.JobVersion(nil, k, c.Version)
	if v == nil {
		return Errorf(CodeNotFound, "job %q in namespace %q at version %d not found", c.JobID, c.Namespace, c.Version)
	}
	t.markStable(v, c.Stable)
	return nil
}

// markStable sets a version's stability in both tables that may hold it.
func (t *tx) markStable(v *Job, stable bool) {
	if v.Stable == stable {
		return
	}
	n := *v
	n.Stable = stable
	t.putVersion(&n)
}

// putVersion stores a changed version in both tables that may hold it.
func (t *tx) putVersion(v *Job) {
	v.ModifyIndex = t.index
	t.put(TableJobVersions, v)
	if cur := t.Job(nil, v.Key()); cur != nil && cur.Version == v.Version && cur.CreateIndex == v.CreateIndex {
		t.put(TableJobs, v)
	}
}

// deriveJobStatuses brings the status of every job that the command touched to
// what its allocations and evaluations say.
func (t *tx) deriveJobStatuses() {
	for k := range t.dirty { // order does not matter: each job is on its own
		j := t.Job(nil, k)
		if j == nil {
			continue
		}
		if status := t.jobStatus(j); status != j.Status {
			n := *j
			n.Status, n.ModifyIndex = status, t.index
			t.storeJob(&n)
			t.countChild(&n, j.Status, status)
		}
	}
}

func (s *Snapshot) jobStatus(j *Job) string {
	switch {
	case (j.Spawns() || j.Type == JobTypeSystem) && j.Stop:
		return JobStatusDead
	case j.Spawns() || j.Type == JobTypeSystem:
		return JobStatusRunning
	}
	any, live := false, ""
	each(s.txn, func(a *Allocation) bool {
		if a.JobCreateIndex == j.CreateIndex {
			any = true
			if !a.Terminal() {
				live = JobStatusRunning
			}
		}
		return live == ""
	}, TableAllocs, "job", j.Namespace, j.ID)
	if live != "" {
		return live
	}
	if len(s.OpenEvalsByJob(j.Key())) > 0 {
		return JobStatusPending
	}
	each(s.txn, func(*Evaluation) bool { any = true; return false }, TableEvals, "job", j.Namespace, j.ID)
	if any || j.Stop || j.Status == JobStatusDead { // history may have been collected
		return JobStatusDead
	}
	return JobStatusPending
}

// ensureSummary gives a job a summary with an entry for each group.
func (t *tx) ensureSummary(j *Job) {
	s := t.Summary(nil, j.Key())
	if s == nil || s.CreateIndex != j.CreateIndex {
		s = &JobSummary{JobID: j.ID, Namespace: j.Namespace, CreateIndex: j.CreateIndex, Children: t.childrenOf(j)}
	}
	n := copySummary(s)
	changed := s.ModifyIndex == 0
	for _, g := range j.TaskGroups {
		if _, ok := n.Summary[g.Name]; !ok {
			n.Summary[g.Name] = TaskGroupSummary{}
			changed = true
		}
	}
	if changed {
		n.ModifyIndex = t.index
		t.put(TableSummaries, n)
	}
}

// share lets summaries that count alike have one map.
func (s *JobSummary) share(x *interner) {
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	stored := appendMap((*buf)[:0], s.Summary, func(b []byte, g TaskGroupSummary) []byte { return appendTaskGroupSummary(b, &g) })
	*buf = stored
	slot := x.find(stored)
	if same, ok := slot.v.(map[string]TaskGroupSummary); ok && slot.stored == string(stored) {
		s.Summary = same
	} else if len(stored) <= maxShared {
		*slot = value{string(stored), s.Summary}
	}
}

func copySummary(s *JobSummary) *JobSummary {
	n := *s
	n.Summary = make(map[string]TaskGroupSummary, len(s.Summary)+1)
	for k, v := range s.Summary {
		n.Summary[k] = v
	}
	return &n
}

// count moves one allocation of a group from one client status to another; ""
// stands for "not there".
func (t *tx) count(a *Allocation, from, to string) {
	s := t.Summary(nil, a.JobKey())
	if from == to || s == nil || s.CreateIndex != a.JobCreateIndex {
		return
	}
	n := copySummary(s)
	g := n.Summary[a.TaskGroup]
	g.add(from, -1)
	g.add(to, 1)
	if from == "" && g.Queued > 0 {
		g.Queued--
	}
	n.Summary[a.TaskGroup], n.ModifyIndex = g, t.index
	t.put(TableSummaries, n)
}

func (g *TaskGroupSummary) add(clientStatus string, n int) {
	switch clientStatus {
	case AllocClientPending:
		g.Starting += n
	case AllocClientRunning:
		g.Running += n
	case AllocClientComplete:
		g.Complete += n
	case AllocClientFailed:
		g.Failed += n
	case AllocClientLost:
		g.Lost += n
	case AllocClientUnknown:
		g.Unknown += n
	}
}

func (t *tx) setQueued(k JobKey, queued map[string]int) {
	s := t.Summary(nil, k)
	if s == nil {
		return
	}
	n, changed := copySummary(s), false
	for group, q := range queued {
		if g, ok := n.Summary[group]; ok && g.Queued != q {
			g.Queued, changed = q, true
			n.Summary[group] = g
		}
	}
	if changed {
		n.ModifyIndex = t.index
		t.put(TableSummaries, n)
	}
}
