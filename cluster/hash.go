package cluster

import (
	"crypto/sha256"
	"encoding/binary"
)

// Hash is the SHA-256 over every record of every table as AppendStored gives it, in the order of Records:
// equal for two servers that have applied the same log up to the same index, and
// for a state before and after it went through a snapshot.
func (s *Snapshot) Hash() [sha256.Size]byte {
	sum := sha256.New()
	var record []byte
	put := func(b []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		sum.Write(n[:])
		sum.Write(b)
	}
	err := s.Records(func(t *Table, key string, v any) error {
		record = AppendStored(record[:0], v)
		put([]byte(t.Name))
		put([]byte(key))
		put(record)
		return nil
	})
	if err != nil {
		panic(err) // only what the function above gives
	}
	return [sha256.Size]byte(sum.Sum(nil))
}
