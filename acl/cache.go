package acl

import (
	"container/list"
	"sync"
)

// MaxCached bounds the ACLs that a Cache keeps.
const MaxCached = 512

// Cache keeps compiled ACLs by what they were made of; the one asked for longest
// ago goes first. Its zero value is ready. It may be used by several goroutines.
type Cache struct {
	mu    sync.Mutex
	order list.List // of *cached, the last used first
	by    map[string]*list.Element
}

type cached struct {
	key string
	acl *ACL
}

// Get gives the ACL of a key, which names the policies and their versions, and
// makes it when it is not there. An error is not kept.
func (c *Cache) Get(key string, compile func() (*ACL, error)) (*ACL, error) {
	c.mu.Lock()
	if e := c.by[key]; e != nil {
		c.order.MoveToFront(e)
		a := e.Value.(*cached).acl
		c.mu.Unlock()
		return a, nil
	}
	c.mu.Unlock()
	a, err := compile() // two at once do the work twice and no harm
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil {
		c.by = map[string]*list.Element{}
	}
	if e := c.by[key]; e != nil {
		return e.Value.(*cached).acl, nil
	}
	c.by[key] = c.order.PushFront(&cached{key, a})
	if c.order.Len() > MaxCached {
		last := c.order.Back()
		c.order.Remove(last)
		delete(c.by, last.Value.(*cached).key)
	}
	return a, nil
}

// Len is how many ACLs are kept.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.order.Len()
}
