package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/hashicorp/go-memdb"
)

// Apply applies the log entry at index. The Result's Err is the user's error: the
// command was refused and changed nothing. An error from Apply itself means that
// the entry cannot be understood and the server must stop. A request ID that was
// applied before gives its first result again and changes nothing.
func (s *State) Apply(index uint64, entry []byte) (Result, error) {
	cmd, err := DecodeCommand(entry)
	if err != nil {
		return Result{}, fmt.Errorf("log index %d: %w", index, err)
	}
	stamp := cmd.stamp()
	if stamp.RequestID != "" {
		if kept := first[resultEntry](s.db.Txn(false), nil, TableResults, "id", stamp.RequestID); kept != nil {
			return kept.Result, nil
		}
	}
	t := s.begin(index, *stamp)
	res, refused := t.apply(cmd)
	if refused != nil {
		t.txn.Abort()
		t = s.begin(index, *stamp)
		res = Result{Err: refused}
	}
	res.Index = index
	if stamp.RequestID != "" {
		s.seq++
		t.put(TableResults, &resultEntry{RequestID: stamp.RequestID, Seq: s.seq, Result: res})
		if s.seq > MaxResults {
			if old := first[resultEntry](t.txn, nil, TableResults, "seq", seq(s.seq-MaxResults)); old != nil {
				t.delete(TableResults, old)
			}
		}
	}
	t.txn.Commit()
	return res, nil
}

// tx is one command's transaction: reads through Snapshot see its own writes.
type tx struct {
	*Snapshot
	index uint64
	stamp Stamp
	ids   int
	dirty map[JobKey]bool // jobs whose status must be derived again
}

func (s *State) begin(index uint64, stamp Stamp) *tx {
	return &tx{
		Snapshot: &Snapshot{txn: s.db.Txn(true), abandoned: s.abandoned},
		index:    index, stamp: stamp, dirty: map[JobKey]bool{},
	}
}

// put inserts or replaces a record and moves its table's index.
func (t *tx) put(table string, v any) {
	t.must(t.txn.Insert(table, v))
	t.touch(table)
}

func (t *tx) delete(table string, v any) {
	t.must(t.txn.Delete(table, v))
	t.touch(table)
}

func (t *tx) touch(table string) {
	if e := first[IndexEntry](t.txn, nil, TableIndex, "id", table); e == nil || e.Index != t.index {
		t.must(t.txn.Insert(TableIndex, &IndexEntry{Table: table, Index: t.index}))
	}
}

func (t *tx) must(err error) {
	if err != nil && !errors.Is(err, memdb.ErrNotFound) {
		panic(fmt.Sprintf("state: %v", err)) // a table or index that the schema lacks: a bug
	}
}

// newID derives an ID from the request's: the same on every replica, new for
// each call.
func (t *tx) newID() string {
	t.ids++
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d/%d", t.stamp.RequestID, t.index, t.ids))
	h := hex.EncodeToString(sum[:16])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func (t *tx) apply(cmd Command) (res Result, refused *Error) {
	switch c := cmd.(type) {
	case *RegisterNode:
		refused = t.registerNode(c)
	case *UpdateNodeStatus:
		t.updateNodeStatus(c)
	case *UpdateEligibility:
		refused = t.updateEligibility(c)
	case *UpdateDrain:
		refused = t.updateDrain(c)
	case *DeregisterNode:
		refused = t.deregisterNode(c)
	case *RegisterJob:
		res, refused = t.registerJob(c)
	case *DeregisterJob:
		res = t.deregisterJob(c)
	case *UpdateEvals:
		t.putEvals(c.Evals)
	case *ApplyPlans:
		for _, p := range c.Plans {
			res.Plans = append(res.Plans, t.applyPlan(p))
		}
	case *UpdateAllocs:
		t.updateAllocs(c)
	case *UpdateTransitions:
		t.updateTransitions(c)
	case *UpdateDeployment:
		res, refused = t.updateDeployment(c)
	case *SetJobStability:
		refused = t.setJobStability(c)
	case *CreateModelVersion:
		res, refused = t.createModelVersion(c)
	case *SetAlias:
		refused = t.setAlias(c)
	case *SetSchedulerConfig:
		res = t.setSchedulerConfig(c)
	case *Reap:
		t.reap(c)
	case *BootstrapACL:
		refused = t.bootstrapACL(c)
	case *UpsertACLPolicies:
		refused = t.upsertACLPolicies(c)
	case *DeleteACLPolicies:
		t.deleteACLPolicies(c)
	case *UpsertACLTokens:
		refused = t.upsertACLTokens(c)
	case *DeleteACLTokens:
		refused = t.deleteACLTokens(c)
	case *CreateIntroToken:
		refused = t.createIntroToken(c)
	case *UseIntroToken:
		refused = t.useIntroToken(c)
	case *DeleteIntroTokens:
		refused = t.deleteIntroTokens(c)
	case *RegisterServer:
		refused = t.registerServer(c)
	case *RemoveServer:
		t.removeServer(c)
	case *SetAutopilotConfig:
		res, refused = t.setAutopilotConfig(c)
	case *SetClusterMeta:
		refused = t.setClusterMeta(c)
	case *SetFleetHold:
		refused = t.setFleetHold(c)
	default:
		panic(fmt.Sprintf("command %T has no rule", cmd))
	}
	if refused == nil {
		t.deriveJobStatuses()
	}
	return res, refused
}

// putEvals creates or updates evaluations; creation time and index of known ones stay.
func (t *tx) putEvals(evals []*Evaluation) {
	for _, e := range evals {
		e = Clone(e)
		e.CreateIndex, e.ModifyIndex, e.ModifyTime = t.index, t.index, t.stamp.Time
		if old := t.Eval(nil, e.ID); old != nil {
			e.CreateIndex, e.CreateTime = old.CreateIndex, old.CreateTime
		} else if e.CreateTime == 0 {
			e.CreateTime = t.stamp.Time
		}
		t.put(TableEvals, e)
		t.dirty[e.JobKey()] = true
		if e.QueuedAllocations != nil && e.Terminal() {
			t.setQueued(e.JobKey(), e.QueuedAllocations)
		}
	}
}

// newEval makes a pending evaluation of a job.
func (t *tx) newEval(j *Job, trigger, id string) *Evaluation {
	if id == "" {
		id = t.newID()
	}
	return &Evaluation{
		ID: id, Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: trigger, JobModifyIndex: j.JobModifyIndex, Status: EvalStatusPending,
	}
}

// evalJobs creates one evaluation for each job in keys that still exists.
func (t *tx) evalJobs(keys []JobKey, trigger string, fill func(*Evaluation)) {
	seen := map[JobKey]bool{}
	for _, k := range keys {
		j := t.Job(nil, k)
		if j == nil || seen[k] {
			continue
		}
		seen[k] = true
		e := t.newEval(j, trigger, "")
		if fill != nil {
			fill(e)
		}
		t.putEvals([]*Evaluation{e})
	}
}

func (t *tx) setSchedulerConfig(c *SetSchedulerConfig) Result {
	old := first[SchedulerConfiguration](t.txn, nil, TableScheduler, "id", "config")
	var current uint64
	if old != nil {
		current = old.ModifyIndex
	}
	if c.CheckIndex && c.Index != current {
		return Result{}
	}
	cfg := Clone(c.Config)
	cfg.CreateIndex, cfg.ModifyIndex = t.index, t.index
	if old != nil {
		cfg.CreateIndex = old.CreateIndex
	}
	t.put(TableScheduler, cfg)
	return Result{Updated: true}
}

// reap forgets terminal records; what is live or still referred to stays.
func (t *tx) reap(c *Reap) {
	for _, id := range c.Evals {
		if e := t.Eval(nil, id); e != nil && e.Terminal() {
			t.delete(TableEvals, e)
			t.dirty[e.JobKey()] = true
		}
	}
	for _, id := range c.Allocs {
		if a := t.Alloc(nil, id); a != nil && a.ClientTerminal() {
			t.reapAlloc(a)
		}
	}
	for _, id := range c.Deployments {
		if d := t.Deployment(nil, id); d != nil && !d.Active() {
			t.delete(TableDeployments, d)
		}
	}
	for _, k := range c.Jobs {
		j := t.Job(nil, k)
		if j == nil || j.Status != JobStatusDead {
			continue
		}
		t.purgeJob(j)
		for _, e := range t.EvalsByJob(nil, k) {
			t.delete(TableEvals, e)
		}
		for _, a := range t.AllocsByJob(nil, k) {
			if a.ClientTerminal() {
				t.reapAlloc(a)
			}
		}
		for _, d := range t.DeploymentsByJob(nil, k) {
			t.delete(TableDeployments, d)
		}
	}
}

// reapAlloc forgets an allocation, and the job version that only it kept when
// its job was purged.
func (t *tx) reapAlloc(a *Allocation) {
	t.delete(TableAllocs, a)
	k := a.JobKey()
	if t.Job(nil, k) != nil {
		return
	}
	for _, other := range t.AllocsByJob(nil, k) {
		if other.JobVersion == a.JobVersion {
			return
		}
	}
	if v := t.JobVersion(nil, k, a.JobVersion); v != nil {
		t.delete(TableJobVersions, v)
	}
}
