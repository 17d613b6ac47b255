package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
)

// Entry is a log entry: a command as EncodeCommand wrote it, and its place in the log.
type Entry struct {
	Index uint64
	Data  []byte
}

// Apply applies the log entry at index. The Result's Err is the user's error: the
// command was refused and changed nothing. An error from Apply itself means that
// the entry cannot be understood and the server must stop. A request ID that was
// applied before gives its first result again and changes nothing.
func (s *State) Apply(index uint64, entry []byte) (Result, error) {
	res, err := s.ApplyBatch([]Entry{{index, entry}})
	if err != nil {
		return Result{}, err
	}
	return res[0], nil
}

// ApplyBatch applies entries in their order, as Apply does one by one, but readers see
// the state before all of them or behind. With an error there is a result for each
// entry before the one that cannot be understood, and those are applied.
func (s *State) ApplyBatch(entries []Entry) ([]Result, error) {
	b := s.begin()
	defer b.commit()
	out := make([]Result, 0, len(entries))
	for _, e := range entries {
		res, err := b.apply(e)
		if err != nil {
			return out, fmt.Errorf("log index %d: %w", e.Index, err)
		}
		out = append(out, res)
	}
	return out, nil
}

// batch is a write: a view of its own that becomes the state's by commit.
type batch struct {
	*view
	state   *State
	edit    edit
	changes []change
	touched []string // of the index table
}

// change is one record that was put (new) or deleted (only old).
type change struct {
	table    *Table
	key      string
	old, new any
}

func (s *State) begin() *batch {
	s.edits++
	now := s.hub.current.Load()
	return &batch{
		view:  &view{hub: s.hub, rows: slices.Clone(now.rows), index: slices.Clone(now.index), results: now.results},
		state: s, edit: s.edits,
	}
}

func (b *batch) commit() { b.hub.publish(b.view, b.changes, b.touched) }

func (b *batch) apply(e Entry) (Result, error) {
	cmd, err := decodeCommand(e.Data, b.state.shared)
	if err != nil {
		return Result{}, err
	}
	stamp := cmd.stamp()
	if stamp.RequestID != "" {
		if at, ok := b.state.kept[stamp.RequestID]; ok {
			return b.results.at(at).Result, nil
		}
	}
	t := &tx{Snapshot: &Snapshot{txn: b.view, abandoned: b.state.abandoned}, batch: b, index: e.Index, stamp: *stamp, dirty: map[JobKey]bool{}}
	before := len(b.changes)
	res, refused := t.apply(cmd)
	if refused != nil {
		b.undo(before)
		t.touched = nil
		res = Result{Err: refused}
	}
	res.Index = e.Index
	if stamp.RequestID != "" {
		b.keep(resultEntry{RequestID: stamp.RequestID, Seq: b.state.seq + 1, Result: res})
		t.touch(TableResults)
	}
	for _, name := range t.touched {
		b.setIndex(name, e.Index)
		if !slices.Contains(b.touched, name) {
			b.touched = append(b.touched, name)
		}
	}
	return res, nil
}

// keep keeps a result for retries, in place of the oldest when there are many.
func (b *batch) keep(e resultEntry) {
	b.state.seq = e.Seq
	b.state.kept[e.RequestID] = b.results.next
	b.results.add(e)
	if b.results.next-b.results.first > b.state.keep {
		delete(b.state.kept, b.results.drop())
	}
}

// rows gives a table to write to.
func (b *batch) rows(t *Table) *rows {
	r := b.view.rows[t.number]
	if r.edit != b.edit {
		c := *r
		c.edit, c.by = b.edit, slices.Clone(r.by)
		r = &c
		b.view.rows[t.number] = r
	}
	return r
}

// undo takes back all changes from the given one on.
func (b *batch) undo(from int) {
	for i := len(b.changes) - 1; i >= from; i-- {
		c := &b.changes[i]
		b.recount(c.table, c.new, c.old)
		if c.old == nil {
			b.rows(c.table).delete(b.edit, c.table, c.key)
		} else {
			b.rows(c.table).put(b.edit, c.table, c.key, c.old)
		}
	}
	clear(b.changes[from:])
	b.changes = b.changes[:from]
}

// tx is one command's transaction: reads through Snapshot see its own writes.
type tx struct {
	*Snapshot
	batch   *batch
	index   uint64
	stamp   Stamp
	ids     int
	dirty   map[JobKey]bool   // jobs whose status must be derived again
	touched []string          // tables, and what else has an entry in the index table
	usage   map[string]*Usage // of namespaces, as the command leaves it
	begun   map[JobKey]int    // children that begin to run, and how many of each parent
}

// Alloc gives an allocation as it is kept, packed: rules look at little of it.
func (t *tx) Alloc(ws WatchSet, id string) *Allocation {
	return first[Allocation](t.txn, ws, TableAllocs, "id", id)
}

// put inserts or replaces a record and moves its table's index.
func (t *tx) put(table string, v any) {
	of := tableByName[table]
	key := of.key(v)
	if key == "" {
		panic(fmt.Sprintf("state: a record of table %s has no key: %+v", table, v)) // a rule let it pass: a bug
	}
	if of.pack != nil {
		of.pack(t.batch.state.shared, v)
	}
	old := t.batch.rows(of).put(t.batch.edit, of, key, v)
	t.batch.recount(of, old, v)
	t.batch.changes = append(t.batch.changes, change{of, key, old, v})
	t.charge(of, old, v)
	t.touch(table)
}

// delete forgets a record and moves its table's index.
func (t *tx) delete(table string, v any) {
	of := tableByName[table]
	key := of.key(v)
	if old := t.batch.rows(of).delete(t.batch.edit, of, key); old != nil {
		t.batch.recount(of, old, nil)
		t.batch.changes = append(t.batch.changes, change{of, key, old, nil})
		t.charge(of, old, nil)
	}
	t.touch(table)
}

// touch moves an entry of the index table to the command's index, unless it is refused.
func (t *tx) touch(name string) {
	if !slices.Contains(t.touched, name) {
		t.touched = append(t.touched, name)
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
		res.Plans = t.applyPlans(c)
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
	case *DispatchJob:
		res, refused = t.dispatchJob(c)
	case *LaunchJob:
		res, refused = t.launchJob(c)
	case *UpsertNamespaces:
		refused = t.upsertNamespaces(c)
	case *DeleteNamespaces:
		refused = t.deleteNamespaces(c)
	case *UpsertQuotas:
		refused = t.upsertQuotas(c)
	case *DeleteQuotas:
		refused = t.deleteQuotas(c)
	case *PromoteDeployment:
		res, refused = t.promoteDeployment(c)
	case *ScaleJob:
		res, refused = t.scaleJob(c)
	case *TagVersion:
		refused = t.tagVersion(c)
	case *OrderDevice:
		refused = t.orderDevice(c)
	default:
		panic(fmt.Sprintf("command %T has no rule", cmd))
	}
	if refused == nil {
		t.deriveJobStatuses()
		t.writeUsage()
	}
	return res, refused
}

// A command was decoded for its rule alone: what it holds may go into the state as it
// is. Records of the state are shared with those who read: a rule changes a copy, and
// copies along what it changes below.

// putEvals creates or updates evaluations; creation time and index of known ones stay.
func (t *tx) putEvals(evals []*Evaluation) {
	for _, e := range evals {
		c := *e
		e = &c
		e.CreateIndex, e.ModifyIndex, e.ModifyTime = t.index, t.index, t.stamp.Time
		if old := t.Eval(nil, e.ID); old != nil {
			e.CreateIndex, e.CreateTime = old.CreateIndex, old.CreateTime
			if t.stamp.Rules >= rulesScaling && (t.unreserves(old, e) || t.unclaims(old, e)) {
				t.touch(IndexCapacity) // others may have what was kept for it
			}
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

// unreserves says whether an evaluation that waited for room waits for less of it now: then what was reserved for it
// may be anybody's.
func (t *tx) unreserves(old, e *Evaluation) bool {
	return old.shortOfRoom() && (e.Terminal() || !maps.Equal(e.QueuedAllocations, old.QueuedAllocations)) && t.RunLimited()
}

// unclaims says whether an evaluation gives up a claim whose place it has not taken.
func (t *tx) unclaims(old, e *Evaluation) bool {
	for _, c := range old.Claims {
		kept := !e.Terminal() && slices.ContainsFunc(e.Claims, func(k *Claim) bool { return k.AllocID == c.AllocID })
		if !kept && t.Alloc(nil, c.AllocID) == nil {
			return true
		}
	}
	return false
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

// evalJobs creates one evaluation for each job in keys that exists, or of which at
// least a version is kept, since something of it still runs.
func (t *tx) evalJobs(keys []JobKey, trigger string, fill func(*Evaluation)) {
	seen := map[JobKey]bool{}
	for _, k := range keys {
		if seen[k] {
			continue
		}
		seen[k] = true
		j := t.Job(nil, k)
		if kept := t.JobVersions(nil, k); j == nil && len(kept) > 0 {
			j = kept[0]
		}
		if j == nil {
			continue
		}
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
	if was := (PreemptionConfig{}); old != nil && old.PreemptionConfig != cfg.PreemptionConfig || old == nil && cfg.PreemptionConfig != was {
		t.touch(IndexCapacity) // what found no room may preempt now
	}
	return Result{Updated: true}
}
