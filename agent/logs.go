package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// followEvery is how often the end of a followed file is looked at.
const followEvery = 100 * time.Millisecond

// logFile is one file of a rotated series.
type logFile struct {
	index int
	size  int64
}

// logSeries lists DIR/NAME.0, DIR/NAME.1…, oldest first.
func logSeries(dir, name string) ([]logFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []logFile
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), name+".")
		i, err := strconv.Atoi(rest)
		if !ok || err != nil || i < 0 || !e.Type().IsRegular() {
			continue
		}
		if info, err := e.Info(); err == nil {
			files = append(files, logFile{i, info.Size()})
		}
	}
	slices.SortFunc(files, func(a, b logFile) int { return a.index - b.index })
	return files, nil
}

// locate finds where to begin: offset bytes after the start, or before the end, of
// all files together.
func locate(files []logFile, origin string, offset int64) (index int, at int64) {
	if len(files) == 0 {
		return 0, max(0, offset)
	}
	var total int64
	for _, f := range files {
		total += f.size
	}
	if origin == "end" {
		offset = total - offset
	}
	offset = min(max(0, offset), total)
	for _, f := range files[:len(files)-1] {
		if offset < f.size {
			return f.index, offset
		}
		offset -= f.size
	}
	return files[len(files)-1].index, offset
}

// logs streams a task's log. Following ends with the task.
func (a *Agent) logs(ctx context.Context, q *pb.LogsRequest, out answerStream) error {
	r, err := a.known(q.AllocId)
	if err != nil {
		return err
	}
	t := r.tasks[q.Task]
	switch {
	case q.Task == "":
		return cluster.Errorf(cluster.CodeInvalid, "must provide task name")
	case t == nil:
		return cluster.Errorf(cluster.CodeNotFound, "unknown task name %q", q.Task)
	case q.Type != "stdout" && q.Type != "stderr":
		return cluster.Errorf(cluster.CodeInvalid, "log type %q is not stdout or stderr", q.Type)
	case q.Origin != "" && q.Origin != "start" && q.Origin != "end":
		return cluster.Errorf(cluster.CodeInvalid, "origin %q is not start or end", q.Origin)
	}
	name := q.Task + "." + q.Type
	files, err := logSeries(r.dir.Logs(), name)
	switch {
	case err != nil && r.collected():
		return cluster.Errorf(cluster.CodeNotFound, "the logs of allocation %s were removed: it ended long ago", r.id)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	case len(files) == 0 && !q.Follow:
		return cluster.Errorf(cluster.CodeNotFound, "task %q not started yet. No logs available", q.Task)
	}
	index, at := locate(files, q.Origin, q.Offset)
	s := &logStream{out: out, dir: r.dir, name: name, index: index, at: at}
	defer s.close()
	for {
		ended := t.over() // read once more after the end
		if err := s.drain(); err != nil {
			return err
		}
		if !q.Follow || ended {
			return nil
		}
		select {
		case <-time.After(followEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// over says whether the task has ended for good.
func (t *taskRunner) over() bool {
	t.r.mu.Lock()
	defer t.r.mu.Unlock()
	return t.local().State.State == cluster.TaskStateDead
}

func (r *runner) collected() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.local.Collected
}

// logStream reads a rotated series from (index, at) on.
type logStream struct {
	out   answerStream
	dir   task.AllocDir
	name  string
	index int
	at    int64
	file  *os.File
	buf   []byte
}

func (s *logStream) close() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// drain sends all that there is now.
func (s *logStream) drain() error {
	for {
		if s.file == nil {
			f, err := os.Open(filepath.Join(s.dir.Logs(), s.name+"."+strconv.Itoa(s.index)))
			if errors.Is(err, os.ErrNotExist) {
				if s.skip() {
					continue
				}
				return nil
			}
			if err != nil {
				return err
			}
			s.file = f
		}
		// A next file means that this one is complete; looked at before the read, so that nothing is missed.
		next := s.skippable()
		n, err := s.send()
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if !next {
			return nil
		}
		s.close()
		s.skip()
	}
}

// send sends one chunk and returns its size, 0 at the end of the file.
func (s *logStream) send() (int, error) {
	if s.buf == nil {
		s.buf = make([]byte, maxFrame)
	}
	n, err := s.file.ReadAt(s.buf, s.at)
	if err != nil && err != io.EOF {
		return 0, err
	}
	if n == 0 {
		return 0, nil
	}
	s.at += int64(n)
	return n, s.out.Send(&pb.AnswerChunk{
		Data: s.buf[:n], File: filepath.Join("alloc", "logs", s.name+"."+strconv.Itoa(s.index)), Offset: s.at,
	})
}

// after is the oldest file newer than the current one.
func (s *logStream) after() (int, bool) {
	files, err := logSeries(s.dir.Logs(), s.name)
	if err != nil {
		return 0, false
	}
	for _, f := range files {
		if f.index > s.index {
			return f.index, true
		}
	}
	return 0, false
}

func (s *logStream) skippable() bool { _, ok := s.after(); return ok }

// skip moves on to the next file there is.
func (s *logStream) skip() bool {
	i, ok := s.after()
	if ok {
		s.index, s.at = i, 0
	}
	return ok
}
