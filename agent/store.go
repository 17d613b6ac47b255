package agent

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// Buckets of state.db. Jobs and allocations are cluster.Marshal records as the
// servers sent them; local is JSON of a localState.
var (
	bucketNode   = []byte("node")
	bucketJobs   = []byte("jobs")   // NAMESPACE NUL ID NUL VERSION
	bucketAllocs = []byte("allocs") // allocation ID
	bucketLocal  = []byte("local")  // allocation ID
)

// lockWait bounds the wait for another agent to let go of the state file.
const lockWait = 5 * time.Second

// store is the agent's memory. What a method wrote is on the disk when it returns.
type store struct{ db *bbolt.DB }

// localState is what the node knows of one allocation, besides what the servers
// said. Fields are only ever added.
type localState struct {
	Tasks             map[string]*localTask
	ClientStatus      string
	ClientDescription string
	Healthy           *bool        // verdict for Deployment
	HealthTime        cluster.Time // of the verdict
	Deployment        string       // the deployment that Healthy is about
	WatchFrom         cluster.Time // when the watch for it began
	Collected         bool         // the directory was removed
	Gone              bool         // the servers forgot it: forget it too once its tasks have ended
	Noticed           cluster.Time // when its tasks were told that it is preempted, 0: not
	Began             cluster.Time `json:",omitempty"` // when the first of its main tasks began to run, 0: not yet
	Overrun           bool         `json:",omitempty"` // it has reached its run time limit
}

// localTask is what the node knows of one task.
type localTask struct {
	State    *cluster.TaskState
	Run      *task.State      `json:",omitempty"` // of the process, nil when none was started or its end is recorded
	Serving  *cluster.Serving `json:",omitempty"` // of a model's server; replaced, never changed
	Ready    cluster.Time     // since when the model is ready, 0: not
	Prepared bool             // directories, artifacts and templates are there
	Window   int64            // unix nanoseconds: start of the restart policy's interval
	Count    int              // restarts in it
	Stopping bool             // it is to be ended

	Checkpoint *cluster.Checkpoint `json:",omitempty"` // the newest that it has told of; replaced, never changed
}

func openStore(path string) (*store, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait})
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return nil, fmt.Errorf("agent state %s is in use: another agent runs with this data folder", path)
	}
	if err != nil {
		return nil, fmt.Errorf("agent state %s: %w", path, err)
	}
	db.MaxBatchDelay = time.Millisecond
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketNode, bucketJobs, bucketAllocs, bucketLocal} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("agent state %s: %w", path, err), db.Close())
	}
	return &store{db}, nil
}

func (s *store) close() error { return s.db.Close() }

// nodeID gives the node's UUID, drawn when the state is new.
func (s *store) nodeID() (id string, err error) {
	err = s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketNode)
		if id = string(b.Get([]byte("id"))); id != "" {
			return nil
		}
		id = newUUID()
		return b.Put([]byte("id"), []byte(id))
	})
	return id, err
}

// nextRun numbers this run of the agent: by its start in unix seconds, or one more
// than the last run where the clock has gone back or not moved.
func (s *store) nextRun(now time.Time) (run uint64, err error) {
	err = s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketNode)
		run = uint64(max(now.Unix(), 1))
		if v := b.Get([]byte("run")); v != nil {
			last, err := strconv.ParseUint(string(v), 10, 64)
			if err != nil {
				return fmt.Errorf("agent state: number of the last run: %w", err)
			}
			run = max(run, last+1)
		}
		return b.Put([]byte("run"), strconv.AppendUint(nil, run, 10))
	})
	return run, err
}

// deviceFaults reads what devices have failed, and why.
func (s *store) deviceFaults() (faults map[string]string, err error) {
	err = s.note("faults", &faults)
	return faults, err
}

func (s *store) saveDeviceFaults(faults map[string]string) error { return s.saveNote("faults", faults) }

// interruption reads the notice that the node's provider gave last, nil for none.
func (s *store) interruption() (n *cluster.Interruption, err error) {
	err = s.note("interruption", &n)
	return n, err
}

func (s *store) saveInterruption(n *cluster.Interruption) error {
	return s.saveNote("interruption", n)
}

// note reads what is kept of the node under a name, as JSON; what is not there leaves into as it is.
func (s *store) note(name string, into any) error {
	return s.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketNode).Get([]byte(name))
		if v == nil {
			return nil
		}
		if err := json.Unmarshal(v, into); err != nil {
			return fmt.Errorf("agent state: %s: %w", name, err)
		}
		return nil
	})
}

func (s *store) saveNote(name string, value any) error {
	v, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketNode).Put([]byte(name), v) })
}

// newUUID draws a UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func jobKey(j *cluster.Job) []byte { return versionKey(j.Key(), j.Version) }

func versionKey(k cluster.JobKey, version uint64) []byte {
	return []byte(k.Namespace + "\x00" + k.ID + "\x00" + strconv.FormatUint(version, 10))
}

// saveDesired stores what the servers want in one step: jobs and allocations that
// are new or changed, and which to forget.
func (s *store) saveDesired(jobs []*cluster.Job, allocs []*cluster.Allocation, forget []string) error {
	if len(jobs)+len(allocs)+len(forget) == 0 {
		return nil
	}
	return s.db.Update(func(tx *bbolt.Tx) error {
		for _, j := range jobs {
			if err := tx.Bucket(bucketJobs).Put(jobKey(j), cluster.Marshal(j)); err != nil {
				return err
			}
		}
		for _, a := range allocs {
			if err := tx.Bucket(bucketAllocs).Put([]byte(a.ID), cluster.Marshal(a)); err != nil {
				return err
			}
		}
		for _, id := range forget {
			if err := errors.Join(tx.Bucket(bucketAllocs).Delete([]byte(id)), tx.Bucket(bucketLocal).Delete([]byte(id))); err != nil {
				return err
			}
		}
		return nil
	})
}

// dropJobs removes the job versions that keep does not name.
func (s *store) dropJobs(keep map[string]bool) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketJobs)
		var drop [][]byte
		err := b.ForEach(func(k, _ []byte) error {
			if !keep[string(k)] {
				drop = append(drop, append([]byte(nil), k...))
			}
			return nil
		})
		for _, k := range drop {
			err = errors.Join(err, b.Delete(k))
		}
		return err
	})
}

// saveLocal stores what the node knows of an allocation that it was told to run.
func (s *store) saveLocal(id string, l *localState) error {
	v, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return s.db.Batch(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketLocal).Put([]byte(id), v)
	})
}

// job reads a stored job version; nil when it is not there.
func (s *store) job(k cluster.JobKey, version uint64) (*cluster.Job, error) {
	var j *cluster.Job
	err := s.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketJobs).Get(versionKey(k, version))
		if v == nil {
			return nil
		}
		j = new(cluster.Job)
		return cluster.Unmarshal(v, j)
	})
	return j, err
}

// restored is one allocation as the last agent left it.
type restored struct {
	alloc *cluster.Allocation
	local *localState // nil: it had not begun
}

// load reads all allocations.
func (s *store) load() (all []restored, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketAllocs).ForEach(func(k, v []byte) error {
			r := restored{alloc: new(cluster.Allocation)}
			if err := cluster.Unmarshal(v, r.alloc); err != nil {
				return fmt.Errorf("allocation %s: %w", k, err)
			}
			if l := tx.Bucket(bucketLocal).Get(k); l != nil {
				r.local = new(localState)
				if err := json.Unmarshal(l, r.local); err != nil {
					return fmt.Errorf("allocation %s: %w", k, err)
				}
			}
			all = append(all, r)
			return nil
		})
	})
	return all, err
}

// removeQuietly removes a file that need not be there.
func removeQuietly(path string) { _ = os.Remove(path) }
