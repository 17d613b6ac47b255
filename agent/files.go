package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// maxEntries bounds the listing of a directory.
const maxEntries = 10_000

// fileInfo has the shape of Nomad's API.
type fileInfo struct {
	Name        string
	IsDir       bool
	Size        int64
	FileMode    string
	ModTime     time.Time
	ContentType string `json:",omitempty"`
}

func infoOf(i fs.FileInfo) fileInfo {
	return fileInfo{Name: i.Name(), IsDir: i.IsDir(), Size: i.Size(), FileMode: i.Mode().String(), ModTime: i.ModTime()}
}

// files reads an allocation's directory. Nothing outside it can be reached, and
// nothing in a task's secrets directory.
func (a *Agent) files(ctx context.Context, q *pb.FileRequest, out answerStream) error {
	r, err := a.known(q.AllocId)
	if err != nil {
		return err
	}
	rel, err := filepath.Rel("/", path.Clean("/"+q.Path))
	if err != nil {
		return cluster.Errorf(cluster.CodeInvalid, "path %q: %v", q.Path, err)
	}
	root, err := os.OpenRoot(string(r.dir))
	if err != nil {
		return notThere(r, q.Path, err)
	}
	defer root.Close()
	f, info, err := openInside(root, rel)
	if err != nil {
		return notThere(r, q.Path, err)
	}
	defer f.Close()
	switch q.Op {
	case "stat":
		return sendJSON(out, stat(r, rel, f, info))
	case "ls":
		return list(f, info, q.Path, out)
	case "read", "stream":
		if info.IsDir() {
			return cluster.Errorf(cluster.CodeInvalid, "file %q is a directory", q.Path)
		}
		if !info.Mode().IsRegular() {
			return cluster.Errorf(cluster.CodeInvalid, "file %q is not a regular file", q.Path)
		}
		if q.Op == "read" {
			return sendFile(f, info, q, out)
		}
		s := &fileStream{root: root, rel: rel, path: q.Path, file: f, out: out}
		return s.run(ctx, r, info, q)
	}
	return cluster.Errorf(cluster.CodeUnsupported, "file operation %q is not known", q.Op)
}

// openInside opens a file without ever blocking, and refuses one that lies in a
// secrets directory, by whatever name it was reached.
func openInside(root *os.Root, rel string) (*os.File, fs.FileInfo, error) {
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = checkSecrets(root, f)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func checkSecrets(root *os.Root, f *os.File) error {
	at, err1 := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	base, err2 := filepath.EvalSymlinks(root.Name())
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	rel, err := filepath.Rel(base, at)
	if err != nil {
		return err
	}
	if task.SecretsPath(rel) {
		return cluster.Errorf(cluster.CodeForbidden, "Reading secret file prohibited: %s", rel)
	}
	return nil
}

// notThere puts an error into words that do not tell where the agent keeps its data.
func notThere(r *runner, name string, err error) error {
	var known *cluster.Error
	switch {
	case errors.As(err, &known):
		return err
	case r.collected():
		return cluster.Errorf(cluster.CodeNotFound, "the files of allocation %s were removed: it ended long ago", r.id)
	case errors.Is(err, fs.ErrNotExist):
		return cluster.Errorf(cluster.CodeNotFound, "stat %s: no such file or directory", name)
	case errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL): // null characters, for one
		return cluster.Errorf(cluster.CodeInvalid, "no file can have that path: it is too long or holds a null character")
	case errors.Is(err, syscall.ENXIO):
		return cluster.Errorf(cluster.CodeInvalid, "file %q is not a regular file", name)
	}
	return cluster.Errorf(cluster.CodeForbidden, "open %s: %v", name, errors.Unwrap(err)) // it leads out of the directory, for one
}

func stat(r *runner, rel string, f *os.File, info fs.FileInfo) fileInfo {
	i := infoOf(info)
	if rel == "." {
		i.Name = r.id
	}
	i.ContentType = "application/octet-stream"
	if info.Mode().IsRegular() {
		var head [512]byte
		n, _ := f.ReadAt(head[:], 0)
		i.ContentType = http.DetectContentType(head[:n])
		if byName := mime.TypeByExtension(filepath.Ext(info.Name())); byName != "" {
			i.ContentType = byName
		}
	}
	return i
}

func list(dir *os.File, info fs.FileInfo, name string, out answerStream) error {
	if !info.IsDir() {
		return cluster.Errorf(cluster.CodeInvalid, "file %q is not a directory", name)
	}
	entries, err := dir.ReadDir(maxEntries)
	if err != nil && err != io.EOF {
		return err
	}
	all := make([]fileInfo, 0, len(entries))
	for _, e := range entries {
		if i, err := e.Info(); err == nil {
			all = append(all, infoOf(i))
		}
	}
	return sendJSON(out, all)
}

// start is where to begin to read a file of a size.
func start(q *pb.FileRequest, size int64) (int64, error) {
	if q.Offset < 0 {
		return 0, cluster.Errorf(cluster.CodeInvalid, "offset %d is negative", q.Offset)
	}
	switch q.Origin {
	case "", "start":
		return q.Offset, nil
	case "end":
		return max(0, size-q.Offset), nil
	}
	return 0, cluster.Errorf(cluster.CodeInvalid, "origin %q is not start or end", q.Origin)
}

// sendFile sends a file's bytes from an offset, at most limit.
func sendFile(f *os.File, info fs.FileInfo, q *pb.FileRequest, out answerStream) error {
	at, err := start(q, info.Size())
	if err != nil {
		return err
	}
	left := q.Limit
	if left <= 0 {
		left = info.Size() - at
	}
	buf := make([]byte, maxFrame)
	for left > 0 {
		n, err := f.ReadAt(buf[:min(left, maxFrame)], at)
		if n > 0 {
			at, left = at+int64(n), left-int64(n)
			if err := out.Send(&pb.AnswerChunk{Data: buf[:n], Offset: at}); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fileStream sends a file and what is appended to it.
type fileStream struct {
	root *os.Root
	rel  string
	path string
	file *os.File
	out  answerStream
}

func (s *fileStream) run(ctx context.Context, r *runner, info fs.FileInfo, q *pb.FileRequest) error {
	at, err := start(q, info.Size())
	if err != nil {
		return err
	}
	buf := make([]byte, maxFrame)
	for {
		ended := r.isDone()
		for {
			n, err := s.file.ReadAt(buf, at)
			if n > 0 {
				at += int64(n)
				if err := s.out.Send(&pb.AnswerChunk{Data: buf[:n], File: s.path, Offset: at}); err != nil {
					return err
				}
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
		}
		if !q.Follow || ended {
			return nil
		}
		select {
		case <-time.After(followEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
		now, err := s.root.Stat(s.rel)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return s.out.Send(&pb.AnswerChunk{File: s.path, Offset: at, FileEvent: "file deleted"})
		case err != nil:
			return err
		case now.Size() < at:
			at = 0
			if err := s.out.Send(&pb.AnswerChunk{File: s.path, FileEvent: "file truncated"}); err != nil {
				return err
			}
		}
	}
}
