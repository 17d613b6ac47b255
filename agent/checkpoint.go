package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// A task tells of its checkpoints in a file of its NOMAD_TASK_DIR,
// {"step": 1200, "path": "/data/ckpt/1200", "time": "2026-01-02T15:04:05Z"}; without a time that
// of the file counts.
const (
	checkpointFile  = "rx_checkpoint.json"
	checkpointBytes = 4 << 10         // at most
	checkpointEvery = 5 * time.Second // is how often the file of a running task is looked at
)

// eventCheckpoint is the event of a file that cannot be read.
const eventCheckpoint = "Checkpoint"

// readCheckpoint reads what a task tells, nil if it tells nothing. A file that is as it was, by
// time and size, is not read again.
func readCheckpoint(dir task.Dir, seen fs.FileInfo) (*cluster.Checkpoint, fs.FileInfo, error) {
	root, err := os.OpenRoot(dir.Local())
	if err != nil {
		return nil, nil, nil // not built yet
	}
	defer root.Close()
	f, err := root.OpenFile(checkpointFile, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, nil, err
	case seen != nil && os.SameFile(seen, info) && seen.ModTime().Equal(info.ModTime()) && seen.Size() == info.Size():
		return nil, seen, nil
	case !info.Mode().IsRegular():
		return nil, info, errors.New("is not a file")
	}
	b, err := io.ReadAll(io.LimitReader(f, checkpointBytes+1))
	if err != nil {
		return nil, info, err
	}
	c, err := parseCheckpoint(b)
	if c != nil && c.Time == 0 {
		c.Time = cluster.TimeOf(info.ModTime())
	}
	return c, info, err
}

func parseCheckpoint(b []byte) (*cluster.Checkpoint, error) {
	if len(b) > checkpointBytes {
		return nil, fmt.Errorf("has more than %d bytes", checkpointBytes)
	}
	var said struct {
		Step *int64     `json:"step"`
		Time *time.Time `json:"time"`
		Path string     `json:"path"`
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	switch err := d.Decode(&said); {
	case err != nil:
		return nil, fmt.Errorf("is no JSON with step, time and path: %w", err)
	case said.Step == nil || *said.Step < 0:
		return nil, errors.New("names no step, a number from 0")
	case len(said.Path) > cluster.MaxCheckpointPath:
		return nil, fmt.Errorf("has a path of %d bytes; at most %d are allowed", len(said.Path), cluster.MaxCheckpointPath)
	}
	c := &cluster.Checkpoint{Step: *said.Step, Path: said.Path}
	if said.Time != nil {
		c.Time = cluster.TimeOf(*said.Time)
	}
	return c, nil
}

// takeCheckpoint takes over what the task tells, if that is new. What cannot be read is an
// event and no more.
func (t *taskRunner) takeCheckpoint() {
	t.mu.Lock()
	c, info, err := readCheckpoint(t.r.dir.Task(t.name), t.checkpoint)
	t.checkpoint = info
	t.mu.Unlock()
	switch {
	case err != nil && info != nil:
		t.event(failureEvent(eventCheckpoint, "checkpoint_error", fmt.Errorf("%s %w", checkpointFile, err)))
	case c != nil:
		t.update(func(l *localTask) { l.Checkpoint = c })
	}
}

// checkpoints are those that the tasks have told of, or were started with. Caller holds mu.
func (r *runner) checkpoints() map[string]*cluster.Checkpoint {
	all := maps.Clone(r.alloc.Checkpoints)
	for name, l := range r.local.Tasks {
		if l.Checkpoint == nil {
			continue
		}
		if all == nil {
			all = map[string]*cluster.Checkpoint{}
		}
		all[name] = l.Checkpoint
	}
	return all
}
