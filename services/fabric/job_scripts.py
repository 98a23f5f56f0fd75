"""The steps of the queue that must be one: look, then queue, deliver, claim, end or leave. Lua, run by Redis."""

# KEYS: stream, job. ARGV: id, fingerprint of what was asked, request, time, most entries.
SUBMIT = """
local asked = redis.call('HGET', KEYS[2], 'asked')
if asked then
  if asked ~= ARGV[2] then return 'other' end
  return redis.call('HGET', KEYS[2], 'state')
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[5]) then return 'full' end
redis.call('HSET', KEYS[2], 'asked', ARGV[2], 'request', ARGV[3], 'created', ARGV[4], 'state', 'JOB_STATE_QUEUED')
redis.call('XADD', KEYS[1], '*', 'job', ARGV[1])
return 'JOB_STATE_QUEUED'
"""

# KEYS: stream. ARGV: group, consumer, entry, idle time to set in ms. JUSTID: not a delivery.
HEARTBEAT = """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if #pending == 0 or pending[1][2] ~= ARGV[2] then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'IDLE', ARGV[4], 'JUSTID')
return 1
"""

# KEYS: job. ARGV: most deliveries. Gives the number of this delivery, request, why the last one failed; nothing of a job that
# is over or unknown. A delivery too many is told, but neither counted nor begun.
DELIVER = """
local state, request, why = unpack(redis.call('HMGET', KEYS[1], 'state', 'request', 'why'))
if not request or state == 'JOB_STATE_SUCCEEDED' or state == 'JOB_STATE_FAILED' then return {} end
local number = 1 + (tonumber(redis.call('HGET', KEYS[1], 'deliveries')) or 0)
if number <= tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[1], 'deliveries', number, 'state', 'JOB_STATE_RUNNING')
end
return {number, request, why or ''}
"""

# KEYS: stream, job. ARGV: group, entry, state, outcome, time, seconds to keep it. The first end stands: 0 for a later one.
END = """
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local state = redis.call('HGET', KEYS[2], 'state')
if not state or state == 'JOB_STATE_SUCCEEDED' or state == 'JOB_STATE_FAILED' then return 0 end
redis.call('HSET', KEYS[2], 'state', ARGV[3], 'outcome', ARGV[4], 'finished', ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return 1
"""

# KEYS: stream. ARGV: group, consumer. One with entries stays: with its name they would be gone.
LEAVE = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
