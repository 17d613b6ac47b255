package raftstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/rxvision/rxvision/cluster"
)

// stable is the file that keeps raft's term and vote, and the few things that
// this package must not forget. It holds all of them twice, each copy with a
// checksum, and a change has happened once both copies are on disk. So a torn
// write leaves the other copy, a flipped byte is put right from it, and because
// the file never grows, a full disk does not keep a server from voting.
//
// A copy is: stableMagic, a sequence number (8 bytes), the payload's length (4
// bytes), the payload (a msgpack map of bytes), and a CRC-32C of all that.
type stable struct {
	path   string
	sync   func(*os.File) error
	mu     sync.Mutex
	file   *os.File
	seq    uint64
	pairs  map[string][]byte
	healed string // what was put right at open, "" for nothing
}

const (
	stableFile  = "stable"
	stableMagic = "RXSTABLE"
	stableHead  = len(stableMagic) + 8 + 4
	// stableCopy is the room of one copy in bytes. The segments of a log of several
	// gigabytes fit in.
	stableCopy = 64 << 10
)

// errKeyNotFound has the words that raft compares with.
var errKeyNotFound = errors.New("not found")

// createStable makes the file with its first values.
func createStable(dir string, pairs map[string][]byte) error {
	path := filepath.Join(dir, stableFile)
	f, err := os.OpenFile(path+tmpSuffix, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	b, err := packStable(1, pairs)
	if err == nil {
		_, err = f.Write(bytes.Repeat(append(b, make([]byte, stableCopy-len(b))...), 2)) // real blocks, not a hole
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+tmpSuffix))
	}
	if err := os.Rename(path+tmpSuffix, path); err != nil {
		return err
	}
	return syncFolder(dir)
}

// openStable reads the file. The error is a *Damage when neither copy is whole,
// and os.ErrNotExist when there is no file.
func openStable(dir string, readOnly bool) (*stable, error) {
	s := &stable{path: filepath.Join(dir, stableFile), sync: (*os.File).Sync}
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	var err error
	if s.file, err = os.OpenFile(s.path, mode, 0); err != nil {
		return nil, err
	}
	var faults [2]error
	var seqs [2]uint64
	for i := range faults {
		var pairs map[string][]byte
		if seqs[i], pairs, faults[i] = s.readCopy(i); faults[i] == nil && seqs[i] > s.seq {
			s.seq, s.pairs = seqs[i], pairs
		}
	}
	if s.seq == 0 {
		return nil, errors.Join(&Damage{
			File: s.path, What: fmt.Sprintf("both copies of term, vote and marks (the first %v; the second %v)", faults[0], faults[1]),
		}, s.file.Close())
	}
	if seqs[0] != seqs[1] && !readOnly { // a change that was under way, or a damaged copy
		for i, fault := range faults {
			if fault != nil {
				s.healed = fmt.Sprintf("copy %d %v", i+1, fault)
			}
		}
		if err := s.write(); err != nil {
			return nil, errors.Join(err, s.file.Close())
		}
	}
	return s, nil
}

func (s *stable) readCopy(i int) (uint64, map[string][]byte, error) {
	b := make([]byte, stableCopy)
	if _, err := s.file.ReadAt(b, int64(i)*stableCopy); err != nil && !errors.Is(err, io.EOF) {
		return 0, nil, err
	}
	return unpackStable(b)
}

func packStable(seq uint64, pairs map[string][]byte) ([]byte, error) {
	payload := cluster.Marshal(pairs)
	if n := stableHead + len(payload) + crc32.Size; n > stableCopy {
		return nil, fmt.Errorf("%d bytes do not fit into the %d of the file", n, stableCopy)
	}
	b := binary.BigEndian.AppendUint64([]byte(stableMagic), seq)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return seal(append(b, payload...)), nil
}

func unpackStable(b []byte) (uint64, map[string][]byte, error) {
	if string(b[:len(stableMagic)]) != stableMagic {
		return 0, nil, errors.New("begins wrongly")
	}
	n := int(binary.BigEndian.Uint32(b[stableHead-4:]))
	if n > len(b)-stableHead-crc32.Size {
		return 0, nil, errors.New("has a wrong length")
	}
	whole, err := unseal(b[:stableHead+n+crc32.Size])
	if err != nil {
		return 0, nil, errors.New("does not match its checksum")
	}
	pairs := map[string][]byte{}
	if err := cluster.Unmarshal(whole[stableHead:], &pairs); err != nil {
		return 0, nil, err
	}
	return binary.BigEndian.Uint64(b[len(stableMagic):]), pairs, nil
}

// write brings the pairs to both copies, one after the other.
func (s *stable) write() error {
	b, err := packStable(s.seq+1, s.pairs)
	if err != nil {
		return err
	}
	for i := range int64(2) {
		if _, err := s.file.WriteAt(b, i*stableCopy); err != nil {
			return err
		}
		if err := s.sync(s.file); err != nil {
			return err
		}
	}
	s.seq++
	return nil
}

// put changes some values at once; nil deletes. After an error the old values
// count on here; the next start may find either.
func (s *stable) put(changes map[string][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.pairs
	s.pairs = map[string][]byte{}
	maps.Copy(s.pairs, old)
	for k, v := range changes {
		if v == nil {
			delete(s.pairs, k)
			continue
		}
		s.pairs[k] = bytes.Clone(v)
	}
	if err := s.write(); err != nil {
		s.pairs = old
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	return nil
}

func (s *stable) get(key string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.pairs[key])
}

// Get implements raft.StableStore.
func (s *stable) Get(key []byte) ([]byte, error) {
	v := s.get(string(key))
	if v == nil {
		return nil, errKeyNotFound
	}
	return v, nil
}

// GetUint64 implements raft.StableStore.
func (s *stable) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("%s: %s is no number", s.path, key)
	}
	return binary.BigEndian.Uint64(v), nil
}

func (s *stable) close() error { return s.file.Close() }
