package cluster

// ModelOrigin is the work that made a model version: what a client says of it,
// verified and completed by the rules when the version is recorded.
type ModelOrigin struct {
	Namespace  string
	JobID      string
	JobVersion uint64
	AllocID    string // "": only the job is known
	EvalID     string // that placed the allocation
}

// resolveOrigin verifies where a model version is said to come from against the state
// and fills in what follows: the allocation tells its job, version and evaluation; a
// job alone means its current version.
func (s *Snapshot) resolveOrigin(o *ModelOrigin) *Error {
	if o.Namespace == "" {
		o.Namespace = DefaultNamespace
	}
	if o.AllocID == "" {
		j := s.Job(nil, JobKey{o.Namespace, o.JobID})
		if j == nil {
			return Errorf(CodeNotFound, "the model's origin, job %q in namespace %q, is not known", o.JobID, o.Namespace)
		}
		o.JobVersion, o.EvalID = j.Version, ""
		return nil
	}
	a := s.Alloc(nil, o.AllocID)
	switch {
	case a == nil:
		return Errorf(CodeNotFound, "the model's origin, allocation %q, is not known", o.AllocID)
	case o.JobID != "" && o.JobID != a.JobID || o.Namespace != a.Namespace:
		return Errorf(CodeInvalid, "the model's origin, allocation %s, is of job %q in namespace %q, not of %q in %q", a.ID, a.JobID, a.Namespace, o.JobID, o.Namespace)
	}
	*o = ModelOrigin{Namespace: a.Namespace, JobID: a.JobID, JobVersion: a.JobVersion, AllocID: a.ID, EvalID: a.EvalID}
	return nil
}

// CheckOrigin says what would be wrong with a model version of that origin, nil when
// nothing is: before its bytes are taken in.
func (s *Snapshot) CheckOrigin(o ModelOrigin) error {
	if err := s.resolveOrigin(&o); err != nil {
		return err
	}
	return nil
}

// Lineage is what model versions name of a job: it stays although it has ended. The
// nil Lineage names nothing.
type Lineage struct{ from []*ModelVersion }

// Lineage gives what model versions name of a job, nil when none does.
func (s *Snapshot) Lineage(k JobKey) *Lineage {
	from := list[ModelVersion](s.txn, nil, TableModelVersions, "origin", k.Namespace, k.ID)
	if len(from) == 0 {
		return nil
	}
	return &Lineage{from}
}

// Alloc says whether a model comes from the allocation.
func (l *Lineage) Alloc(id string) bool {
	return l.any(func(o *ModelOrigin) bool { return o.AllocID == id })
}

// Eval says whether the evaluation placed an allocation that a model comes from.
func (l *Lineage) Eval(id string) bool {
	return l.any(func(o *ModelOrigin) bool { return o.EvalID == id })
}

// Version says whether a model comes from that version of the job.
func (l *Lineage) Version(version uint64) bool {
	return l.any(func(o *ModelOrigin) bool { return o.JobVersion == version })
}

func (l *Lineage) any(ok func(*ModelOrigin) bool) bool {
	if l == nil {
		return false
	}
	for _, v := range l.from {
		if ok(v.Origin) {
			return true
		}
	}
	return false
}
